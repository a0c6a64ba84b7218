"""Options, the shared ceilings, and the table of all rows at the end of a run."""

from pathlib import Path

import pytest
import torch

import ctxkern
from ctxkern.testing import report
from ctxkern.testing.measure import ceilings

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("ctxkern")
    group.addoption("--device", default="cpu", help="where to measure (default: cpu)")
    group.addoption("--seconds", type=float, default=2.0, help="time for all peers of a case together (default: 2)")
    group.addoption("--compiled", action="store_true", help="torch.compile of the peers too (a minute per case)")
    group.addoption("--csv", default=None, help="append rows here (default: bench/results/<device>.csv)")


def pytest_configure(config):
    config.stash[ROWS] = []
    core = ctxkern.backends()["cpu"]
    if config.getoption("--device") == "cpu" and not core:
        # as of `python -m pytest` in a checkout, which finds the source tree before the installed package
        where = Path(ctxkern.__file__).parent
        warning = pytest.PytestWarning(f"the portable form is measured: the kernels of {where} are missing ({core})")
        config.issue_config_time_warning(warning, stacklevel=2)


@pytest.fixture
def rows(request):
    """The rows of this run so far; what a benchmark adds is printed and appended to the results at its end."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def peaks(request):
    """Ceilings of the machine by dtype, measured once in this run."""
    device = request.config.getoption("--device")
    return {dtype: ceilings(dtype, device) for dtype in (torch.float32, torch.bfloat16)}


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("ctxkern against its peers (price: our time divided by that of one shared linear layer)")
    terminalreporter.write_line(report.table(rows))
    terminalreporter.write_line("\n" + "\n".join(report.means(rows)))
    device = config.getoption("--device")
    path = config.getoption("--csv") or report.results_file(device, config.rootpath / "bench" / "results")
    if path:
        report.append(rows, path)
        terminalreporter.write_line(f"\n{len(rows)} rows appended to {path}")
