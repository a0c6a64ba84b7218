"""Attached models on two processes equal one process on the joint batch: DDP, FSDP2, tensor parallel, checkpointing."""

import copy

import pytest
import torch
from helpers.attached import D, K, Model, N, R, S
from helpers.processes import fill, full, gradients, same_on_all, share
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ctxkern
from ctxkern.testing import force
from ctxkern.testing.oracle import assert_matches

B = 4
TARGETS = ["up", "down", "head"]
KINDS = ("contexts", "factors", "adapters")
INDEX = torch.tensor([0, 1, -1, 2])  # no sequence of a process uses all adapters
X, TABLE, DY = same_on_all(B, S, D, seed=11), same_on_all(N, K, seed=12), same_on_all(B, S, 3, seed=13)
CHECKPOINTS = (None, {"use_reentrant": False}, {"use_reentrant": True})


def base():
    torch.manual_seed(0)
    return Model().double()


def attach(model, kind):
    if kind == "adapters":
        ctxkern.attach_adapters(model, N, R, TARGETS, alpha=3)
    else:
        ctxkern.attach_contexts(model, K, TARGETS, rank=R if kind == "factors" else None)
    return model


def attached(kind, dtype=torch.float64):
    return fill(attach(base().to(dtype), kind))


def using(model, kind, table, index):
    if kind == "adapters":
        return ctxkern.use(model, adapter_index=index)
    return ctxkern.use(model, context=table, context_index=index.clamp(min=0))


def step(model, kind, rank=0, world=1, used=None, dtype=torch.float64):
    """{name: tensor} of a forward and backward on a process's share; the gradients are those of the mean over all."""
    model.zero_grad()
    x = share(X, rank, world).to(dtype, copy=True).requires_grad_()
    table = TABLE.to(torch.float32 if dtype is torch.bfloat16 else dtype, copy=True).requires_grad_()
    with using(used or model, kind, table, share(INDEX, rank, world)):
        y = model(x)
    # after the block, as recomputation must remember what was in use
    (y * share(DY, rank, world)).sum(dtype=y.dtype).mul(world).backward()
    own = {"y": y, "x": x.grad}
    if table.grad is not None:
        own["table"] = table.grad
    return {n: full(t).detach().clone() for n, t in own.items()}, gradients(model)


def assert_same(got, want, rank, world):
    """Of `step`: outputs and gradients of x are a process's share, those of the table are added up."""
    (own, grads), (whole, whole_grads) = got, want
    scale = {"y": 1, "x": world, "table": world}
    assert own.keys() == whole.keys()
    for name in ("y", "x"):
        torch.testing.assert_close(own[name], share(whole[name], rank, world) * scale[name])
    if "table" in own:
        torch.distributed.all_reduce(own["table"])
        torch.testing.assert_close(own["table"], whole["table"] * scale["table"])
    assert grads.keys() == whole_grads.keys()
    assert len(grads) > 0
    torch.testing.assert_close(grads, whole_grads)


def data_parallel(rank, world, _folder):
    for kind in KINDS:
        want = step(attached(kind), kind)
        for how in CHECKPOINTS:
            inner = attached(kind)
            inner.how = how
            if how is not None and how["use_reentrant"]:
                # a checkpoint of this kind needs an input with a gradient, and DDP static graphs for it
                model = DistributedDataParallel(inner, static_graph=True)
            else:
                model = DistributedDataParallel(inner)
            for used in (model, inner):
                assert_same(step(model, kind, rank, world, used), want, rank, world)
        with pytest.raises(ValueError, match="model is in DistributedDataParallel already; it must be attached"):
            ctxkern.attach_adapters(DistributedDataParallel(nn.Linear(4, 4)), N, R, "module")


def sharded(kind, **how):
    model = attached(kind, how.pop("dtype", torch.float64))
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model


def fully_sharded(rank, world, _folder):
    for kind in KINDS:
        want = step(attached(kind), kind)
        for checkpoints, reshard in ((None, True), (None, False), (CHECKPOINTS[1], True), (CHECKPOINTS[2], True)):
            model = sharded(kind, reshard_after_forward=reshard)
            model.how = checkpoints
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert_same(step(model, kind, rank, world), want, rank, world)
        if kind == "adapters":
            scale = model.blocks[0].up.lora_scale
            assert scale.dtype is torch.float32
            assert torch.equal(full(scale), torch.full((N,), 3 / R))


def each_adapter(model, rank=0, world=1, **how):
    """A model after steps by AdapterAdamW; the second adapter waits for the third step, then is forgotten."""
    banks = [p for p in model.parameters() if p.requires_grad]
    optimizer = ctxkern.AdapterAdamW(banks, lr=0.05, lr_scales=[1.0, 0.5, 2.0], grad_clip=0.3, weight_decay=0.1, **how)
    for index in ([0, 2, -1, 2], [2, 0, 0, -1], [1, 0, 1, 2], [1, 1, 2, 0]):
        optimizer.zero_grad()
        with ctxkern.use(model, adapter_index=share(torch.tensor(index), rank, world)):
            y = model(share(X, rank, world))
        (y - share(DY, rank, world)).square().sum().mul(world).backward()
        optimizer.step()
        if index[0] == 1:
            optimizer.reset(1)
    return {name: full(p).detach() for name, p in model.named_parameters()}, optimizer


def adapters_are_stepped_where_they_lie(rank, world, _folder):
    want, whole = each_adapter(attached("adapters"))
    got, optimizer = each_adapter(sharded("adapters"), rank, world)
    torch.testing.assert_close(got, want)
    for (_, own), (_, other) in zip(optimizer.state.items(), whole.state.items(), strict=True):
        torch.testing.assert_close({n: full(t) for n, t in own.items()}, dict(other))
        assert own["exp_avg"].to_local().numel() < other["exp_avg"].numel()
    model = sharded("adapters")
    banks = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(TypeError, match=r"sharded by rows, as FSDP2 does"):
        ctxkern.AdapterAdamW([banks[0], banks[1].full_tensor()])
    with pytest.raises(TypeError, match=r"banks that are \[Shard\(dim=1\)\]; all must"):
        ctxkern.AdapterAdamW([banks[0].redistribute(placements=[Shard(1)])])


def fully_sharded_in_halves(rank, world, _folder):
    """bfloat16 parameters with sums in float32, beside tables in float32: within the einsum's budget in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in KINDS:
        exact, plain = attached(kind), attached(kind).bfloat16()
        model = sharded(kind, dtype=torch.float32, mp_policy=policy)
        got, grads = step(model, kind, rank, world, dtype=torch.bfloat16)
        with force(backend="reference"):
            _, einsum = step(plain, kind, dtype=torch.bfloat16)
            halves, _ = step(plain, kind, rank, world, dtype=torch.bfloat16)
            whole, want = step(exact, kind, rank, world)[0], step(exact, kind)[1]
        assert all(g.dtype is torch.float32 for g in grads.values())
        assert_matches(got, whole, halves, kind)
        assert_matches({n: g.bfloat16() for n, g in grads.items()}, want, einsum, kind)


def bases_in_halves(_rank, _world, _folder):
    """float32 parameters that were added to a bfloat16 model, sharded together without a policy."""
    for kind in KINDS:
        model = fill(attach(base().bfloat16(), kind))
        one = copy.deepcopy(model)
        fully_shard(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
        torch.testing.assert_close(step(model, kind, dtype=torch.bfloat16), step(one, kind, dtype=torch.bfloat16))


def in_files(_rank, _world, folder):
    for kind in KINDS:
        one, model = attached(kind), sharded(kind)
        where = folder / kind / "files"
        ctxkern.save_attached(model, where)
        again, other = base(), sharded(kind)
        ctxkern.load_attached(again, where)
        for p in other.parameters():
            if p.requires_grad:
                nn.init.zeros_(p)
        ctxkern.load_attached(other, where)
        for got in (again, other):
            torch.testing.assert_close(state(got), state(one), rtol=0, atol=0)
        with pytest.raises((NotADirectoryError, RuntimeError), match="Not a directory|another process could not write"):
            ctxkern.save_attached(model, where / "attached.json" / "below")
        whole = base()
        fully_shard(whole)
        with pytest.raises(ValueError, match="model is in fully_shard already; it must be attached to before"):
            ctxkern.load_attached(whole, where)
        with pytest.raises(ValueError, match="detach: model is sharded by FSDP; it must be whole"):
            ctxkern.detach(model)
        if kind == "adapters":
            ctxkern.export_adapter(model, 1, folder / "adapter")
            ctxkern.import_adapter(other, 2, folder / "adapter")
            for layer, before in ((other.blocks[0].up, one.blocks[0].up), (other.head, one.head)):
                for name in ("lora_A", "lora_B", "lora_scale"):
                    got, want = full(getattr(layer, name)), getattr(before, name)
                    assert torch.equal(got, want[[0, 1, 1]]), name


def state(model):
    return {n: full(t) for n, t in model.state_dict().items()}


def plan():
    inner = {"up": ColwiseParallel, "down": RowwiseParallel}
    styles = {f"blocks.{i}.{name}": style() for i in (0, 1) for name, style in inner.items()}
    return styles | {"head": ColwiseParallel(output_layouts=Replicate())}


PLACED = {
    "contexts": {"up.bilinear": Shard(1), "down.bilinear": Shard(0)},
    "factors": {"up.bilinear.in_factor": Replicate(), "up.bilinear.out_factor": Shard(1)}
    | {"down.bilinear.in_factor": Shard(0), "down.bilinear.out_factor": Replicate()},
    "adapters": {"up.lora_A": Replicate(), "up.lora_B": Shard(1), "down.lora_A": Shard(2), "down.lora_B": Replicate()},
}


def tensor_parallel(_rank, world, folder):
    """torch's own styles, before or after attaching."""
    mesh = init_device_mesh("cpu", (world,))
    for kind in KINDS:
        want = step(attached(kind), kind)
        for order in ("parallelize", "attach"):
            model = base()
            if order == "attach":
                attach(model, kind)
                if kind == "factors":
                    with pytest.raises(RuntimeError, match="'blocks.0.up' is attached with rank=; parallelize_module"):
                        parallelize_module(model, mesh, plan())
                    continue
            parallelize_module(model, mesh, plan())
            if order == "parallelize":
                attach(model, kind)
            fill(model)
            for name, placement in PLACED[kind].items():
                assert model.blocks[0].get_parameter(name).placements == (placement,), name
            for how in CHECKPOINTS:
                model.how = how
                torch.testing.assert_close(step(model, kind), want)
            for p in model.parameters():
                assert p.grad is None or p.grad.placements == p.placements
            ctxkern.save_attached(model, folder / kind / order)
            other = parallelize_module(base(), mesh, plan())
            ctxkern.load_attached(other, folder / kind / order)
            with torch.no_grad(), using(other, kind, TABLE, INDEX):
                torch.testing.assert_close(other(X), want[0]["y"])
            one, how = attached(kind), {"adapter": 1} if kind == "adapters" else {"context": TABLE[0]}
            for each in (one, model):
                ctxkern.detach(each, **how)
            torch.testing.assert_close(model(X), one(X))
            assert type(model.head) is nn.Linear


def weights_of_a_hypernetwork(_rank, world, _folder):
    found = []
    for model in (base(), parallelize_module(base(), init_device_mesh("cpu", (world,)), plan())):
        ctxkern.attach_adapters(model, 0, R, TARGETS, alpha=3)
        weights = {"blocks.0.up": (B, R, D), "blocks.1.down": (B, R, 2 * D)}
        lora = {
            name: (same_on_all(*shape, seed=21), same_on_all(B, {D: 2 * D, 2 * D: D}[shape[2]], R, seed=22))
            for name, shape in weights.items()
        }
        leaves = [t.requires_grad_() for pair in lora.values() for t in pair]
        with ctxkern.use(model, lora=lora):
            y = model(X)
        found.append((y.detach(), torch.autograd.grad(y, leaves, DY)))
    torch.testing.assert_close(*found)


def on_a_grid(rank, world, _folder):
    """Tensor parallel within FSDP2."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "columns"))
    for kind in KINDS:
        want = step(attached(kind), kind)
        model = fill(attach(parallelize_module(base(), mesh["columns"], plan()), kind))
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        own, grads = step(model, kind, mesh.get_local_rank("data"), 2)
        torch.testing.assert_close(own["y"], share(want[0]["y"], mesh.get_local_rank("data"), 2))
        torch.testing.assert_close(grads, want[1])
