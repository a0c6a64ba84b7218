"""`ctxkern report`: what it writes of a run, and what it says of runs it cannot use."""

import csv
import json
import shutil
from html.parser import HTMLParser

import pytest
import torch
from helpers.runs import TINY, failed, write

from ctxkern.cli import main
from ctxkern.experiments.multifile.analysis.analyse import analyse
from ctxkern.experiments.multifile.analysis.losses import OWN
from ctxkern.experiments.multifile.analysis.summary import sentences
from ctxkern.experiments.multifile.run import load_run
from ctxkern.experiments.multifile.train import Evaluator, prepare

NAMES = ["alpha_1.jsonl", "alpha_2.jsonl", "beta_1.jsonl", "beta_2.jsonl", '<b>&"x.txt']
_VOID = ("meta", "img", "br")


def records(letter, count=30):
    return "".join(json.dumps({"input": f"{i:02}", "target": letter * 3}) + "\n" for i in range(count))


def train(paths, run_dir, seed, *flags):
    fixed = ["--steps", 60, "--lr", 0.01, "--dropout", 0, "--patience", 0, "--no-compare-einsum", "--device", "cpu"]
    argv = ["train", *paths, *TINY, *fixed, "--seed", seed, "--run-dir", run_dir, *flags]
    assert main([str(part) for part in argv]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of two families and one alone, with runs of two seeds."""
    folder = tmp_path_factory.mktemp("report")
    paths = [write(folder, name, records(name[0])) for name in NAMES[:-1]]
    paths.append(write(folder, NAMES[-1], "a text of some length. " * 80))
    for seed in (0, 1):
        train(paths, folder / f"run{seed}", seed)
    assert main(["report", str(folder / "run0"), str(folder / "run1"), "--quiet"]) == 0
    return folder


class Page(HTMLParser):
    """Tags that match, what is referred to, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.tags, self.words = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "style")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_pages_stand_by_themselves(folder):
    for place in ("run0/report/report.html", "run1/report/report.html", "run0/report/runs.html"):
        text = (folder / place).read_text(encoding="utf-8")
        page = Page(text)
        assert {"script", "link", "iframe", "b"}.isdisjoint(page.tags)
        assert page.references
        assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
        assert "url(" not in text
        assert "@import" not in text
    page = Page((folder / "run0" / "report" / "report.html").read_text(encoding="utf-8"))
    assert NAMES[-1] in page.words
    assert page.tags.count("img") == 7
    assert '"lr": 0.01' in "".join(page.words)


def test_numbers_lie_in_files(folder):
    place = folder / "run0" / "report"
    with (place / "losses.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    run = load_run(folder / "run0")
    job = prepare(run.config, [folder / name for name in NAMES])
    evaluate = Evaluator(job.validation_data, job.collator, 4, run.config.eval_windows)
    losses = evaluate(run.model)
    assert {row["file"]: float(row["own"]) for row in rows[:-1]} == pytest.approx(losses, rel=1e-5)
    with (place / "exact_match.csv").open(encoding="utf-8", newline="") as file:
        right = {row["file"]: row["own"] for row in csv.DictReader(file)}
    assert float(right["beta_1.jsonl"]) == evaluate.exact["beta_1.jsonl"]
    assert right[NAMES[-1]] == ""
    with (place / "over_runs.csv").open(encoding="utf-8", newline="") as file:
        over = {row["figure"]: row for row in csv.DictReader(file)}
    each = [json.loads((folder / f"run{i}" / "report" / "figures.json").read_text()) for i in (0, 1)]
    name = "rise of the loss, zero"
    assert float(over[name]["mean over runs"]) == pytest.approx((each[0][name] + each[1][name]) / 2)
    # both rise, of four patterns of signs one is as high
    assert min(each[0][name], each[1][name]) > 0
    assert float(over[name]["p over runs"]) == 1 / 4


def test_start_is_that_of_the_run(folder):
    run = load_run(folder / "run1")
    found = analyse(run, progress=False)
    job = prepare(run.config, [folder / name for name in NAMES])
    assert torch.equal(found.start, job.start)
    assert found.families.names[:2] == ["alpha_*"] * 2
    assert found.swaps.kinds[OWN].rise.abs().max() == 0
    # at step 0 what contexts add is that of the drawn tensors
    assert all(p.change[0] > p.change[1] for p in found.projections)


def test_modulation_that_does_nothing_is_called_so(folder):
    run = load_run(folder / "run0")
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "bilinear" in name:
                parameter.zero_()
    text = " ".join(sentences(analyse(run, progress=False)))
    assert "Contexts do nothing that the validation loss shows" in text
    assert "modulation does nothing" in text
    assert "no further than random vectors" in text


def test_set_contexts_are_told_apart(folder):
    run = load_run(folder / "run0")
    with torch.no_grad():
        centres = torch.eye(4)[torch.tensor([0, 0, 1, 1, 2])]
        run.model.context_embeddings.weight.copy_(centres + 0.01 * torch.randn(5, 4, generator=torch.Generator()))
    found = analyse(run, progress=False)
    assert [p.labels.observed for p in found.purities] == pytest.approx([1.0] * 4)
    assert all(p.labels.p < 0.15 and p.random.p < 0.1 for p in found.purities)


def test_what_is_missing_is_said(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run0", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["files"][0]["path"] = str(tmp_path / "gone.jsonl")
    (run / "config.json").write_text(json.dumps(config))
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "left out: losses and attention: they need the run's files, and " in out
    assert "gone.jsonl is gone" in out
    assert "losses and attention" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_unusable_runs_are_named(folder, tmp_path, capsys):
    run = folder / "run0"
    assert "it must be the folder of a run" in failed(capsys, "report", tmp_path)
    assert "--windows is 0; it must be at least 1" in failed(capsys, "report", run, "--windows", 0)
    assert "names one folder twice" in failed(capsys, "report", run, run)
    assert "--families" in failed(capsys, "report", run, "--families", write(tmp_path, "f.csv", "name\n"))
    train([folder / name for name in NAMES], tmp_path / "other", 0, "--grad-clip", 2)
    assert "has grad_clip 2.0; it must be 1.0" in failed(capsys, "report", run, tmp_path / "other")
