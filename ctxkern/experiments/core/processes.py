"""The processes of a run: one, or as many as torchrun or `accelerate launch` started."""

import os
from typing import Any, TypeVar

import torch

from ctxkern.experiments.core.extras import require

Value = TypeVar("Value")


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the one that writes and prints."""
    return int(os.environ.get("RANK") or 0) == 0


def local_device(kind: str) -> str:
    """The device of this process: `kind`, with its number among those of the machine where there are several."""
    number = os.environ.get("LOCAL_RANK")
    return kind if count() == 1 or kind == "cpu" or ":" in kind or number is None else f"{kind}:{number}"


def accelerator(device: torch.device) -> Any:
    """An `accelerate.Accelerator` for models that are on `device` already; joins the processes.

    Raises:
        ValueError: several processes for a device that they cannot share; mixed precision of float16, which a resumed
            run could not repeat.
    """
    made = require("accelerate").Accelerator(cpu=device.type == "cpu", device_placement=False)
    if made.mixed_precision == "fp16":
        raise ValueError("mixed_precision is 'fp16'; it must be 'no' or 'bf16'")
    if count() > 1 and made.device.type != device.type:
        there = made.device.type
        raise ValueError(f"device is {device}; it must be {there}, where accelerate runs the {count()} processes")
    return made


def join(device: torch.device) -> None:
    """Meet the other processes, where there are any.

    Raises:
        ValueError: as `accelerator`.
    """
    if count() > 1:
        accelerator(device)


def from_main(value: Value) -> Value:
    """The value that the main process has, in all of them."""
    if count() == 1:
        return value
    boxed = [value]
    torch.distributed.broadcast_object_list(boxed, src=0)
    return boxed[0]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether other processes have parts of its parameters, so that all must call it together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        torch.distributed.barrier()
