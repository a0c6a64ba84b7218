"""Pages keep their word: examples run as they stand, links and named files exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "ctxkern/README.md", "bench/README.md", "CHANGELOG.md")), *GUIDES]
# "fragment": cannot run alone. "torchrun 2": a part of the script that 2 processes run, all such blocks of a page.
BLOCK = re.compile(r"(?:<!-- (fragment|torchrun \d+) -->\n)?```python\n(.*?)```", re.DOTALL)


def examples(page, mark=""):
    return [text for found, text in BLOCK.findall(page.read_text()) if found == mark]


def test_the_readmes_examples_run_one_after_another():
    found = examples(ROOT / "README.md")
    assert len(found) >= 2
    names = {}
    for text in found:
        exec(compile(text, "README.md", "exec"), names)
    assert tuple(names["y"].shape) == (32, 128, 512)
    assert names["names"] == ["0", "1"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_a_guides_examples_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for text in examples(page):
        try:
            exec(compile(text, page.name, "exec"), names)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")


SCRIPTS = [(page, mark) for page in GUIDES for mark in sorted({mark for mark, _ in BLOCK.findall(page.read_text())})]
SCRIPTS = [pytest.param(*each, id=each[0].name) for each in SCRIPTS if each[1].startswith("torchrun")]


@pytest.mark.parametrize(("page", "mark"), SCRIPTS)
def test_a_guides_script_runs_on_several_processes(page, mark, tmp_path):
    (tmp_path / "train.py").write_text("\n".join(examples(page, mark)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", mark.split()[1]]
    done = subprocess.run([*torchrun, "train.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_fragments_are_python():
    for page in PAGES:
        for _, text in BLOCK.findall(page.read_text()):
            compile(text, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_that_the_architecture_page_names_exist():
    text = (ROOT / "ctxkern" / "README.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|h|csv))", text))
    assert len(named) > 10
    bases = ROOT, ROOT / "ctxkern"
    assert [name for name in named if not any((base / name).exists() for base in bases)] == []


def test_tables_agree_with_their_rows():
    path = ROOT / "bench" / "tables.py"
    assert subprocess.run([sys.executable, path, "--check"]).returncode == 0, f"run python {path}"
