"""What several processes compute equals what one does; the jobs lie next to this file."""

import pytest
from helpers.processes import together

from distributed import checkpoints

TWO = (
    "layers.data_parallel",
    "layers.fully_sharded",
    "dtensors.calls_divide",
    "dtensors.gradients_of_gradients",
    "dtensors.one_output_of_three",
    "dtensors.what_cannot_be",
    "dtensors.halves_beside_float32",
    "attached.data_parallel",
    "attached.fully_sharded",
    "attached.adapters_are_stepped_where_they_lie",
    "attached.fully_sharded_in_halves",
    "attached.bases_in_halves",
    "attached.in_files",
    "attached.tensor_parallel",
    "attached.weights_of_a_hypernetwork",
    "checkpoints.begin",
    "checkpoints.go_on",
)


def test_two_processes(tmp_path):
    together(tmp_path, 2, *TWO)
    # without any process group, on one
    checkpoints.go_on(0, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_checkpoints_of_two_go_on_with_others(world, tmp_path):
    together(tmp_path, 2, "checkpoints.begin")
    together(tmp_path, world, "checkpoints.go_on")


@pytest.mark.slow
def test_three_processes_which_divide_nothing(tmp_path):
    together(tmp_path, 3, "dtensors.calls_divide")


@pytest.mark.slow
def test_a_grid_of_four(tmp_path):
    together(tmp_path, 4, "dtensors.over_a_grid", "attached.on_a_grid")


@pytest.mark.slow
def test_a_compiled_layer(tmp_path):
    together(tmp_path, 2, "dtensors.compiles")


@pytest.mark.slow
def test_a_transformers_model_by_its_own_plan(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    together(tmp_path, 2, "transformers_models.by_its_own_plan")


@pytest.mark.slow
def test_a_model_that_accelerate_prepares(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    together(tmp_path, 2, "accelerated.prepared")
