"""Pages keep their word: examples run as they stand, links and named files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ctxkern" / "README.md", ROOT / "bench" / "README.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"(<!-- fragment -->\n)?```python\n(.*?)```", re.DOTALL)


def examples(page):
    return [text for fragment, text in BLOCK.findall(page.read_text()) if not fragment]


def test_the_readmes_examples_run_one_after_another():
    found = examples(ROOT / "README.md")
    assert len(found) >= 2
    names = {}
    for text in found:
        exec(compile(text, "README.md", "exec"), names)
    assert tuple(names["y"].shape) == (32, 128, 512)
    assert names["names"] == ["0", "1"]


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
