import os
import subprocess

import pytest

from ctxkern.experiments.core.names import path_from_json, path_to_json, printable, shell_quote, utf8_alias

NAMES = [
    b"plain.txt",
    b"caf\xe9",
    b"a\nb\tc",
    b"\\n",
    b"it's $x",
    "é中🙂".encode(),
    "no\u00a0break".encode(),
    b"\x1b[0m",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_survive(name, tmp_path):
    text = os.fsdecode(name)
    assert printable(text).isprintable()
    assert os.fsencode(path_from_json(path_to_json(text))) == name
    echoed = subprocess.check_output(["bash", "-c", f"printf %s {shell_quote(text)}"], env={"LC_ALL": "C.UTF-8"})
    assert echoed == name
    folder = tmp_path / text
    folder.mkdir()
    (folder / "a").write_text("x")
    with utf8_alias(folder) as alias:
        str(alias).encode("utf-8")
        assert (alias / "a").read_text() == "x"
        aliased = alias != folder
    assert aliased == (name == b"caf\xe9")
    assert (folder / "a").exists()


def test_printable_names_are_what_they_stand_for():
    assert printable(os.fsdecode(b"caf\xe9\n")) == r"caf\xe9\n"
    assert printable("é\u202e\U000e0001\ud800") == r"é\u202e\U000e0001\ud800"
