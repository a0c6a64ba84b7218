"""Fixtures of several files."""

import pytest
import torch
from helpers.attached import new_model, with_contexts


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(without_gradients):
    """With contexts, as after training."""
    return with_contexts(new_model())
