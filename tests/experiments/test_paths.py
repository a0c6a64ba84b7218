import os

import pytest
from helpers.runs import write

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.paths import expand_paths, find_files, standard_library_files


def test_paths_folders_and_patterns(tmp_path):
    for name in ("b/x.txt", "b/c/y.jsonl", "a.md", "b/image.png", "b/.hidden.txt", "b/__pycache__/z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, "some text")
    write(tmp_path, "b/empty.txt", "")
    found = expand_paths([tmp_path / "b", tmp_path / "a.md", tmp_path / "b/x.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b/c/y.jsonl", "b/x.txt", "a.md"]
    assert expand_paths([str(tmp_path / "**" / "*.jsonl")]) == [tmp_path / "b/c/y.jsonl"]
    for bad in ("nothing.txt", "*.nothing"):
        with pytest.raises(ValueError, match=r"nothing"):
            expand_paths([tmp_path / bad])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no file of a known kind"):
        expand_paths([tmp_path / "none"])


def test_the_standard_library_is_at_hand():
    files = standard_library_files()
    assert len(files) == 16
    assert files == standard_library_files()
    assert MultiFileDataset(files).num_files == 16


def test_links_and_what_is_left_out_of_a_folder(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "sub", elsewhere / "deep"):
        path.mkdir(parents=True)
    write(folder, "a.txt", "a")
    write(folder, "empty.txt", "")
    write(folder, "image.png", "x")
    write(folder, "Makefile", "x")
    write(elsewhere / "deep", "far.txt", "far")
    write(elsewhere, "blob", '{"text": "x"}')
    (folder / "dangling.txt").symlink_to("gone.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "back").symlink_to(folder)
    (folder / "z.jsonl").symlink_to(elsewhere / "blob")
    (folder / "twin.txt").symlink_to("a.txt")
    found = find_files([folder])
    assert [path.relative_to(folder).as_posix() for path in found.files] == ["a.txt", "linked/deep/far.txt", "z.jsonl"]
    assert {file.path.name: file.reason for file in found.bad} == {
        "dangling.txt": "a symbolic link to gone.txt, which does not exist",
        "loop.txt": "a symbolic link that leads nowhere: Too many levels of symbolic links",
    }
    assert found.notes == [
        (f"{folder}/sub/back", "a link to a folder that is read already"),
        (f"{folder}/empty.txt", "it is empty"),
        (f"{folder}", "files of other kinds (1 .png, 2 no suffix)"),
        (f"{folder}/twin.txt", f"the same file as {folder}/a.txt"),
    ]
    assert find_files([folder / "*.txt"]).bad == found.bad
    # named, they are bad
    named = find_files([folder / "dangling.txt", folder / "loop.txt", folder / "a.txt"])
    assert len(named.bad) == 2
    assert named.files == [folder / "a.txt"]


def test_a_link_is_read_by_the_suffix_of_its_name(tmp_path):
    write(tmp_path, "5f3c", '{"input": "a", "target": "b"}')
    (tmp_path / "data.jsonl").symlink_to("5f3c")
    assert MultiFileDataset(expand_paths([tmp_path])).data == [{"input": "a", "target": "b"}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    write(tmp_path, "a.txt", "a")
    found = find_files([tmp_path])
    assert [str(file) for file in found.bad] == [f"{tmp_path}/closed: a folder that cannot be read: Permission denied"]


def test_names_of_any_bytes(tmp_path):
    names = [b"caf\xe9.txt", b"two\nlines.txt", b"$x_1$ 100%.txt", "\u00e9\u4e2d.txt".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"some text")
    dataset = MultiFileDataset(expand_paths([tmp_path]))
    shown = [r"caf\xe9.txt", r"two\nlines.txt", "$x_1$ 100%.txt", "\u00e9\u4e2d.txt"]
    assert sorted(dataset.file_names) == sorted(shown)
    assert {os.fsencode(path.name) for path in dataset.file_paths} == set(names)
    # two names that look alike stay distinct
    alike = [write(tmp_path, r"two\nlines.txt", "x"), tmp_path / "two\nlines.txt"]
    assert MultiFileDataset(alike).file_names == [r"two\nlines.txt (0)", r"two\nlines.txt (1)"]
