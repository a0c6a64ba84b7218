"""Files to train on."""

import json

import pytest


@pytest.fixture
def paths(tmp_path):
    """Three jsonl files of 20, 30 and 40 examples, in one folder."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    out = []
    for i in range(3):
        out.append(folder / f"f{i}.jsonl")
        rows = ({"input": f"{j} {i}", "target": "abc"[i] * (1 + j % 3)} for j in range(20 + 10 * i))
        out[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture
def corpus(paths):
    """The folder of `paths`."""
    return paths[0].parent
