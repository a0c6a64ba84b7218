import math
import os
import signal

import pytest
import torch
from helpers.nets import OPTIMIZERS, batch_at, make_net, net_loss
from helpers.runs import KilledError, stop_at
from torch.utils.data import DataLoader

from ctxkern.experiments.core import checkpoint as ckpt
from ctxkern.experiments.core.batches import LoaderBatches
from ctxkern.experiments.core.loop import LoopConfig, Next, TrainingError, fit
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.core.schedule import Plateau, warmup_cosine, without_improvement
from ctxkern.experiments.core.seeding import derive_seed
from ctxkern.testing.oracle import assert_same_bits


def net_evaluate(model):
    assert not model.training
    assert not torch.is_grad_enabled()
    return {"a": net_loss(model, batch_at(1000)).item(), "b": net_loss(model, batch_at(1001)).item(), "c": math.nan}


def run_fit(
    run_dir, steps=20, *, model=None, optimizer=torch.optim.AdamW, loss_fn=net_loss, batches=batch_at, seed=0,
    before_step=None, **changes
):  # fmt: skip
    model = make_net() if model is None else model
    settings = {"log_every": 3, "eval_every": 5, "checkpoint_every": 4, "progress": False, "config": {"width": 8}}
    config = LoopConfig(steps, run_dir, seed=seed, **settings | changes)
    result = fit(
        model, optimizer(model.parameters(), lr=0.05), batches, config,
        loss_fn=loss_fn, evaluate=net_evaluate, lr_factor=lambda step: 1 / (1 + step), before_step=before_step,
    )  # fmt: skip
    return model, result


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize("stop", [0, 1, 4, 7, 18])
def test_resume_ends_in_the_same_bits(tmp_path, stop, optimizer):
    whole, whole_result = run_fit(tmp_path / "whole", optimizer=OPTIMIZERS[optimizer])
    with pytest.raises(KilledError):
        run_fit(tmp_path / "parts", optimizer=OPTIMIZERS[optimizer], loss_fn=stop_at(net_loss, stop))
    torch.manual_seed(123)
    parts, result = run_fit(tmp_path / "parts", optimizer=OPTIMIZERS[optimizer], resume=True)
    assert_same_bits(whole, parts)
    assert result == whole_result
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    again, _ = run_fit(tmp_path / "parts", optimizer=OPTIMIZERS[optimizer], resume=True)
    assert_same_bits(whole, again)


def test_the_seed_of_a_step_matters(tmp_path):
    first, _ = run_fit(tmp_path / "a")
    second, _ = run_fit(tmp_path / "b", seed=1)
    assert not torch.equal(first[0].weight, second[0].weight)
    assert derive_seed(0, "step", 1) == derive_seed(0, "step", 1) != derive_seed(0, "step", 2)


def test_logs_and_checkpoints_of_a_run(tmp_path):
    model, result = run_fit(tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "validation" in row] == [0, 5, 10, 15, 20]
    assert rows[0]["validation"]["c"] is None
    assert rows[0]["mean"] == pytest.approx((rows[0]["validation"]["a"] + rows[0]["validation"]["b"]) / 2)
    assert [row["lr"] for row in rows if "lr" in row][:2] == [0.05, 0.025]
    assert result.step == 20
    assert result.interrupted is None
    means = {row["step"]: row["mean"] for row in rows if "mean" in row}
    assert result.best_loss == min(means.values()) == means[result.best_step]
    assert math.isnan(result.last["c"])
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "last.safetensors", "logs", "metrics.jsonl"]
    restored = make_net(seed=4)
    assert ckpt.load_checkpoint(tmp_path / ckpt.LAST, restored).step == ckpt.read_step(tmp_path / ckpt.LAST) == 20
    assert_same_bits(model, restored)
    assert ckpt.load_checkpoint(tmp_path / ckpt.BEST, restored).step == result.best_step


def test_best_keeps_the_lowest_mean_validation(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.0])
    model = make_net()
    config = LoopConfig(20, tmp_path, eval_every=5, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = fit(model, optimizer, batch_at, config, loss_fn=net_loss, evaluate=lambda model: {"a": next(losses)})
    assert (result.best_step, result.best_loss) == (5, 2.0)
    assert ckpt.load_checkpoint(tmp_path / ckpt.BEST, make_net()).step == 5


def test_tensorboard_is_cut_back_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KilledError):
        run_fit(tmp_path, loss_fn=stop_at(net_loss, 11))
    run_fit(tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "logs"), purge_orphaned_data=True)
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 21))
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert [event.value for event in scalars] == pytest.approx(losses)
    assert {"validation/a", "validation_mean", "train/lr"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end_the_run(tmp_path, number):
    whole, _ = run_fit(tmp_path / "whole")
    before = signal.getsignal(number)
    calls = iter(range(100))

    def loss_fn(model, batch):
        if next(calls) == 6:
            os.kill(os.getpid(), number)
        return net_loss(model, batch)

    _, result = run_fit(tmp_path / "parts", loss_fn=loss_fn)
    assert (result.step, result.interrupted) == (7, number)
    assert signal.getsignal(number) is before
    parts, result = run_fit(tmp_path / "parts", resume=True)
    assert result.interrupted is None
    assert_same_bits(whole, parts)


def test_a_cut_last_row_is_dropped(tmp_path):
    with pytest.raises(KilledError):
        run_fit(tmp_path, loss_fn=stop_at(net_loss, 9))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    run_fit(tmp_path, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == list(range(1, 21))


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    calls = iter(range(100))

    def loss_fn(model, batch):
        return net_loss(model, batch) * (math.nan if next(calls) == 9 else 1.0)

    with pytest.raises(TrainingError, match="step 10: the loss is nan"):
        run_fit(tmp_path, loss_fn=loss_fn)
    model = make_net()
    assert ckpt.load_checkpoint(tmp_path / ckpt.LAST, model).step == 8
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_fewer_steps_than_done_and_other_configs_are_refused(tmp_path):
    run_fit(tmp_path)
    with pytest.raises(
        ckpt.CheckpointError, match=r"steps is 10; it must be at least 20, the step of .*last\.safetensors"
    ):
        run_fit(tmp_path, steps=10, resume=True)
    with pytest.raises(ckpt.CheckpointError, match="width is 8 there and 9 here"):
        run_fit(tmp_path, resume=True, config={"width": 9})
    _, result = run_fit(tmp_path, steps=24, resume=True)
    assert result.step == 24
    for name in ("log_every", "eval_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            LoopConfig(1, tmp_path, **{name: 0})


def test_loader_needs_a_sampler_that_can_start_anywhere():
    with pytest.raises(TypeError, match="it must have a method set_epoch"):
        LoaderBatches(DataLoader(torch.zeros(4), batch_size=2))


def test_accumulation_computes_the_whole_batch(tmp_path):
    (whole, _), (parts, _) = (
        run_fit(tmp_path / str(accumulate), model=make_net(dropout=0.0), accumulate=accumulate) for accumulate in (1, 3)
    )
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in "13"]
    torch.testing.assert_close(*map(torch.tensor, losses))
    # a fifth part of four rows is empty
    (four, _), (five, _) = (
        run_fit(tmp_path / str(accumulate), model=make_net(dropout=0.0), accumulate=accumulate) for accumulate in (4, 5)
    )
    assert all(torch.equal(p, q) for p, q in zip(four.parameters(), five.parameters(), strict=True))


def test_before_step_saves_and_ends_a_run(tmp_path):
    asked = []

    def before_step(step):
        asked.append(step)
        return {7: Next.SAVE, 9: Next.STOP}.get(step, Next.STEP)

    _, result = run_fit(tmp_path, before_step=before_step, checkpoint_every=50)
    assert asked == list(range(10))
    assert (result.step, result.ended, result.interrupted) == (9, "nothing is left to train", None)
    assert ckpt.read_step(tmp_path / ckpt.LAST) == 9
    with pytest.raises(KilledError):
        run_fit(tmp_path / "killed", before_step=before_step, checkpoint_every=50, loss_fn=stop_at(net_loss, 8))
    assert ckpt.read_step(tmp_path / "killed" / ckpt.LAST) == 7


def test_patience_ends_a_run(tmp_path):
    losses = {0: 3.0, 2: 2.0, 4: 2.5, 6: 1.9, 8: 2.1, 10: 2.2}

    def run():
        model, step = make_net(), iter(sorted(losses))
        config = LoopConfig(20, tmp_path, eval_every=2, checkpoint_every=2, patience=2, progress=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return fit(
            model, optimizer, batch_at, config,
            loss_fn=net_loss, evaluate=lambda model: {"a": losses[next(step)]}, observe=lambda model: {"norm": 1.5},
        )  # fmt: skip

    result = run()
    assert (result.step, result.best_step, result.best, result.last) == (10, 6, {"a": 1.9}, {"a": 2.2})
    assert result.ended == "the mean validation loss was not lower in 2 evaluations"
    assert [row["observed"] for row in read_metrics(tmp_path) if "mean" in row] == [{"norm": 1.5}] * 6


def fit_means(run_dir, means, **changes):
    """A run of an evaluation for each step, which gives `means`."""
    model, found = make_net(), iter(means)
    settings = {"eval_every": 1, "checkpoint_every": 1, "progress": False} | changes
    return fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batch_at, LoopConfig(len(means) - 1, run_dir, **settings),
        loss_fn=net_loss, evaluate=lambda model: {"a": next(found)},
    )  # fmt: skip


def test_a_lower_mean_must_be_low_enough(tmp_path):
    means = [4.0, 3.0, 2.9, 2.8, 2.69, 2.6, 2.5, 2.4]
    result = fit_means(tmp_path, means, patience=3, min_improvement=0.1)
    # 2.69 is a tenth below 3, and 2.4 below that
    assert (result.step, result.ended, result.best_step) == (7, None, 7)
    result = fit_means(tmp_path / "two", means, patience=2, min_improvement=0.1)
    assert result.step == 3
    assert result.ended == "the mean validation loss was not lower by 0.1 of it in 2 evaluations"
    assert without_improvement([None, 2.0, 1.0, None, 1.0, 1.5]) == 2


PLATEAU = [4.0, 3.0, 3.1, 3.2, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 0.5]


def plateau_rates(run_dir):
    return [row["lr"] for row in read_metrics(run_dir) if "lr" in row]


def test_the_learning_rate_falls_where_the_mean_does_not(tmp_path):
    fit_means(tmp_path, PLATEAU, plateau_patience=1, plateau_factor=0.5)
    # a mean may pass; the second without improvement halves it, from the next step on
    assert plateau_rates(tmp_path) == [0.1 * 0.5**times for times in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)]
    fit_means(tmp_path / "none", PLATEAU, plateau_factor=0.5)
    assert plateau_rates(tmp_path / "none") == [0.1] * 10


def test_a_plateau_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1, threshold=0.2)
    plateau = Plateau(1, 0.3, 0.2)
    for mean in PLATEAU:
        expected.step(mean)
        plateau.add(mean)
        plateau.add(None)
        assert plateau.factor == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_run_has_the_learning_rate_of_its_plateaus(tmp_path, stop):
    how = {"plateau_patience": 1, "plateau_factor": 0.5}
    fit_means(tmp_path / "whole", PLATEAU, **how)
    fit_means(tmp_path / "parts", PLATEAU[: stop + 1], **how)
    model = make_net()
    found = iter(PLATEAU[stop + 1 :])
    config = LoopConfig(10, tmp_path / "parts", eval_every=1, checkpoint_every=1, progress=False, resume=True, **how)
    fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batch_at, config,
        loss_fn=net_loss, evaluate=lambda model: {"a": next(found)},
    )  # fmt: skip
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")


def test_max_minutes_ends_a_run_that_can_go_on(tmp_path):
    _, result = run_fit(tmp_path, max_minutes=1e-9)
    assert (result.step, result.ended) == (0, "max_minutes, 1e-09, have passed")
    _, result = run_fit(tmp_path, resume=True)
    assert (result.step, result.ended) == (20, None)


def test_learning_rate_factor():
    factors = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
