"""Without a GPU Triton's kernels run in its interpreter, which must be asked for before Triton is first imported.
Workers of pytest-xdist share the cores."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


@pytest.fixture(autouse=True, scope="session")
def _folder_that_workers_share(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    os.environ["CTXKERN_TESTS_FOLDER"] = str(folder.parent if workers else folder)
