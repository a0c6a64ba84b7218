"""What was added to a layer whose weight is a DTensor, as tensor parallelism makes it: sharded as the weight is.

Every tensor has named dimensions; the names over which the weight [E, D] is sharded are those over which the others
are. Imported where a weight is a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import zeros as distributed_zeros

from .targets import is_conv1d

NAMES = {
    "bilinear": "DEK",
    "bilinear.in_factor": "DR",
    "bilinear.context_factor": "KR",
    "bilinear.out_factor": "RE",
    "lora_A": "nrD",
    "lora_B": "nEr",
    "lora_scale": "n",
}


def placements(layer: nn.Module, added: str) -> list[Placement]:
    """Of what is added under this name, by those of the weight."""
    weight: Any = layer.weight
    names = "DE" if is_conv1d(layer) else "ED"
    found: list[Placement] = []
    for placement in weight.placements:
        split = names[placement.dim] if isinstance(placement, Shard) else ""
        found.append(Shard(NAMES[added].index(split)) if split and split in NAMES[added] else Replicate())
    return found


def refusal(weight: DTensor) -> str | None:
    """Why nothing can be added to a layer with this weight."""
    if all(type(p) in (Shard, Replicate) for p in weight.placements):
        return None
    return f"has a weight placed as {list(weight.placements)}; each must be Shard or Replicate"


def zeros(layer: nn.Module, added: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor of zeros, of which each process makes its part."""
    weight: Any = layer.weight
    mesh, where = weight.device_mesh, placements(layer, added)
    if weight.is_meta:
        return distribute_tensor(torch.zeros(shape, dtype=dtype, device="meta"), mesh, where)
    return distributed_zeros(shape, dtype=dtype, device_mesh=mesh, placements=where)


def distributed(layer: nn.Module, added: str, t: Tensor) -> Tensor:
    """A tensor that every process has whole, as the first of the mesh has it; a DTensor in its place."""
    weight: Any = layer.weight
    mesh, where = weight.device_mesh, placements(layer, added)
    return t.redistribute(mesh, where) if isinstance(t, DTensor) else distribute_tensor(t, mesh, where)


def part(layer: nn.Module, added: str, t: Tensor) -> Tensor:
    """This process's part of an added tensor, which fits its part of the weight."""
    weight: Any = layer.weight
    whole = t if isinstance(t, DTensor) else DTensor.from_local(t, weight.device_mesh, run_check=False)
    return whole.redistribute(weight.device_mesh, placements(layer, added)).to_local()


def like(weight: Any, local: Tensor) -> Tensor:
    """The DTensor of which `local` is this process's part, sharded as the weight is."""
    mesh, where = weight.device_mesh, weight.placements
    return DTensor.from_local(local, mesh, where, run_check=False, shape=weight.shape, stride=weight.stride())


def sharded_like(t: Any, whole: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as t is without a message between them."""
    return distribute_tensor(whole.to(t.device), t.device_mesh, t.placements, src_data_rank=None)


def rows_of(t: Any) -> Tensor | None:
    """The numbers of the rows of t that this process has; None where t is not sharded by rows."""
    if not all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in t.placements):
        return None
    return sharded_like(t, torch.arange(len(t))).to_local().cpu()


def local_row(t: Any, row: int) -> Tensor | None:
    """A row of t, to write to; None where another process has it.

    Raises:
        TypeError: t is not sharded by rows.
    """
    rows = rows_of(t)
    if rows is None:
        raise TypeError(f"t is placed as {list(t.placements)}; it must be sharded by rows")
    found = (rows == row).nonzero().flatten().tolist()
    return t.to_local()[found[0]] if found else None


def gather(named: dict[str, Tensor]) -> tuple[dict[str, Tensor] | None, DeviceMesh]:
    """(the tensors, whole and on the CPU, for the first process of their mesh, None for the others; the mesh)."""
    mesh = next(t.device_mesh for t in named.values() if isinstance(t, DTensor))
    first = not any(mesh.get_coordinate() or ())
    found = {}
    for name, t in named.items():
        whole = (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        if first:
            found[name] = whole.cpu().contiguous()
    return (found if first else None), mesh


@contextmanager
def all_or_none(mesh: DeviceMesh) -> Iterator[None]:
    """Every process of the mesh leaves the block when all have, an error of one of them is an error of all."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    failed = torch.tensor(error is not None, dtype=torch.int32, device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another process could not write its files; its error says why")
