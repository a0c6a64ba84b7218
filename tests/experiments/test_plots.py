import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctxkern.experiments.core import plots
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


@pytest.mark.parametrize("files_count", [1, 3])
def test_another_runs_best_losses_are_lines(tmp_path, monkeypatch, files_count):
    names = [f"f{i}" for i in range(files_count)]
    rows = [{"step": 0, "mean": 4.0, "validation": dict.fromkeys(names, 4.0)}]
    worse = {"step": 5, "mean": 3.0, "validation": dict.fromkeys(names, 3.0)}
    lowest = {"step": 3, "mean": 2.5, "validation": {name: 2.0 + i for i, name in enumerate(names)}}
    figures = []

    def draw_only(draw, path, figsize):
        figures.append(Figure(figsize))
        draw(figures[0])

    monkeypatch.setattr(plots, "save_figure", draw_only)
    plot_losses(rows, tmp_path / "loss.png", baseline=[*rows, worse, lowest])
    levels = [
        line.get_ydata()[0]
        for axes in figures[0].findobj(Axes)
        for line in axes.lines
        if len(line.get_ydata()) == 2 and line.get_xdata()[1] == 1
    ]
    assert levels == [2.5, *([2.0, 3.0, 4.0] if files_count > 1 else [])]


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
