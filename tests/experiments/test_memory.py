import pytest
import torch
from torch import nn

from ctxkern.experiments.core import memory

CPU = torch.device("cpu")


def build(size):
    return memory.build_model(lambda: nn.Linear(size, size, bias=False), CPU, torch.float32, "size")


def test_what_fits_is_built_in_the_dtype():
    model = memory.build_model(lambda: nn.Linear(3, 3), CPU, torch.float64, "size")
    assert model.weight.dtype == torch.float64
    assert model.weight.device == CPU


def test_the_need_is_four_times_the_parameters(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 4 * 100)
    assert build(10).weight.shape == (10, 10)
    with pytest.raises(ValueError, match=r"the model is too large: .* needs about 0\.0 GiB, and cpu has 0\.0 GiB free"):
        build(11)


@pytest.mark.parametrize("size", [10**6, 10**12, 10**30])
def test_what_does_not_fit_is_not_built(size):
    with pytest.raises(ValueError, match="the model is too large: .*; lower size"):
        build(size)


def test_where_free_memory_is_not_known_a_failed_allocation_is_named(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    with pytest.raises(ValueError, match="the model is too large: .* and cpu has less; lower size"):
        build(10**8)


def test_other_errors_pass():
    def make():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        memory.build_model(make, CPU, torch.float32, "size")


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < memory.free_bytes(CPU) < 2**50
    assert memory.free_bytes(torch.device("meta")) is None
