"""A strict type checker passes on a user's file that calls every public function and layer."""

import subprocess
import sys
from pathlib import Path

import pytest

import ctxkern

PACKAGE = Path(ctxkern.__file__).parent
USER = Path(__file__).with_name("typed_user.py")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    pytest.importorskip("mypy", reason="mypy is not installed")

    def run(text):
        folder = tmp_path_factory.mktemp("typed")
        folder.joinpath("user.py").write_text(text)
        folder.joinpath("ctxkern").symlink_to(PACKAGE)
        cache = tmp_path_factory.getbasetemp() / "mypy"
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            f"--cache-dir={cache}",
            "user.py",
        ]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return run


def test_the_package_says_that_it_is_typed():
    assert PACKAGE.joinpath("py.typed").exists()


def test_a_strict_checker_passes(checked):
    done = checked(USER.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_finds_a_wrong_call(checked):
    done = checked("import ctxkern\n\nctxkern.modulated_linear(1, 2, 3, 4)\n")
    assert done.returncode == 1
    assert 'incompatible type "int"; expected "Tensor"' in done.stdout


def test_the_file_calls_every_public_name():
    text = USER.read_text()
    missing = [name for name in ctxkern.__all__ if name not in ("Plan",) and f"ctxkern.{name}(" not in text]
    missing += [name for name in ctxkern.nn.__all__ if name not in text]
    assert not missing
