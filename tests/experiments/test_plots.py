import pytest

from ctxkern.experiments.core.plots import BY_TOKEN, _wrapped, plot_losses, short_name, smooth


@pytest.mark.parametrize("files_count", [0, 1, 2, 27, 40])
def test_loss_plot_is_drawn(tmp_path, files_count):
    rows = [{"step": step, "loss": 4.0 / step} for step in range(1, 30)]
    for step in (0, 15, 29) if files_count else ():
        by_file = {f"task_{i}.json": 4 - 0.1 * step + 0.01 * i for i in range(files_count)}
        by_file["task_0.json"] = None if files_count > 1 else 1.0
        known = [loss for loss in by_file.values() if loss is not None]
        rows.append({"step": step, "mean": sum(known) / len(known), "validation": by_file})
        if step:
            rows[-1]["observed"] = {BY_TOKEN: 3.0}
    plot_losses(rows, tmp_path / "loss.png", title="title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_helpers():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([0.0, 1.0], 0.0) == [0.0, 1.0]
    assert short_name("folder/a_long_file_name.json", 12) == "folde…e_name"
    assert short_name("plain.txt", 12) == "plain"


@pytest.mark.parametrize("name", ["a_task_of_some_length.json", "x" * 40, "short.txt", "folder/name with words.txt"])
def test_names_are_shown_whole(name):
    lines = _wrapped(name, 12).split("\n")
    assert "".join(lines) == name
    assert all(1 <= len(line) <= 12 for line in lines)
