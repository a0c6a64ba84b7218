"""What bench/gpu.py finds out about single kernels and choices, next to what the library does with the same sizes."""

import collections
import functools

import torch

from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.testing import force
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import captured, interleaved

# (case, projections)
CASES = {
    "price": (Case("price", 16, 2048, 2048, 2048, 32), 1),
    "qkv": (Case("qkv", 32, 512, 1024, 1024, 64), 3),
    "decode": (Case("decode", 64, 1, 2048, 2048, 32), 1),
}
TINY = {"price": (Case("price", 2, 16, 16, 16, 4), 1), "qkv": (Case("qkv", 2, 16, 16, 16, 4), 3)}
WORKSPACES = (32, 64, 128, 256)  # MiB


def _cases(args):
    return TINY if args.rehearse else CASES


def _dtype(args):
    return torch.float32 if args.rehearse else torch.bfloat16


def _seconds(args, fn):
    return interleaved({"": fn}, 0.05, device=args.device)[""].p50


def _graph_ms(args, fn):
    return _seconds(args, fn if args.rehearse else captured(fn)[0]) * 1e3


def _calls(args, case, n, workspace=128 << 20):
    """{direction: callable} of the backend itself."""
    from ctxkern.modulated import triton as backend

    made = [make_inputs(case, _dtype(args), device=args.device, seed=seed) for seed in range(n)]
    lists = ([getattr(one, name) for one in made] for name in ("weight", "bilinear", "bias"))
    operands, douts = Operands(made[0].x, made[0].context, *lists), [one.dy for one in made]
    needs = Gradients(True, True, [True] * n, [True] * n, [False] * n)
    return {
        "fwd": lambda: backend.forward(operands, workspace),
        "bwd": lambda: backend.backward(douts, operands, workspace, needs),
    }


def stage_products(args):
    """The library's products of the sizes that the panel form asks for."""
    random = functools.partial(torch.randn, device=args.device, dtype=_dtype(args))

    def report(name, fn, flops=0, moved=0):
        took = _seconds(args, fn)
        print(
            f"{name}: {took * 1e3:.3f} ms {flops / took / 1e12:.0f} TFLOP/s {moved / took / 1e9:.0f} GB/s", flush=True
        )

    def bmm(b, m, k, n, transposed=False, columns=0):
        left = random(b, k, m).transpose(1, 2) if transposed else random(b, m, k)
        right, out = random(b, k, n), torch.empty(b, m, columns or n, device=args.device, dtype=left.dtype)[..., :n]
        name = f"bmm {b}x[{m},{k}]x[{k},{n}]{' of x^T' if transposed else ''}{' into a strip' if columns else ''}"
        report(name, lambda: torch.bmm(left, right, out=out), 2 * b * m * k * n)

    if args.rehearse:
        return bmm(2, 16, 16, 8, columns=16)
    for strip in (512, 1024, 2048):
        bmm(16, 2048, 2048, strip, columns=2048)  # panel_y, price
    for rows, columns in ((384, 1024), (768, 2048), (2048, 2048)):
        bmm(16, rows, 2048, columns, transposed=True)  # panel_g, price
    for rows in (384, 1024):
        bmm(16, 2048, 2048, rows)  # panel_dx, price
        bmm(32, rows, 512, 1024, transposed=True)  # panel_g, qkv
    for strip in (512, 1024):
        bmm(32, 512, 1024, strip, columns=1024)  # panel_y, qkv
    for n, d, e in ((32768, 2048, 2048), (16384, 1024, 3072)):
        x, w = random(n, d), random(d, e)
        report(f"linear {n}x{d}x{e}", lambda x=x, w=w: x @ w, 2 * n * d * e)
    c, flat, base = random(16, 32), random(2048 * 2048, 32), random(1, 2048 * 2048)
    moved = (flat.numel() + 17 * base.numel()) * 2
    report("addmm [16,32]x[32,4M]: weights", lambda: torch.addmm(base, c, flat.t()), moved=moved)
    source = random(1 << 27)
    target = torch.empty_like(source)
    return report("copy", lambda: target.copy_(source), moved=4 * source.numel())


def _needed(case, n):
    """{kernel: (operations, bytes)} of a whole call, what each must do by itself."""
    N, D, E, K, U = case.tokens, case.D, case.E * n, case.K, case.contexts
    product, bilinear, weights = 2 * N * D * E, D * E * K * 2, U * D * E * 2
    rows = product, N * (D + E) * 2 + weights
    made, outer = (2 * U * D * E * K, bilinear + weights), 2 * N * D * E * K
    return {
        "panel_weights": made,
        "panel_y": rows,
        "panel_g": rows,
        "panel_dx": rows,
        "panel_dbilinear": made,
        "outer_y": (outer + product, bilinear + D * E * 2),
        "outer_dx": (outer, bilinear),
        "outer_dbilinear": (outer, bilinear),
        "matmul": (2 * product, 2 * D * E * 2),
    }


def _steps(fn, take):
    """Runs fn, and take(step, values) for each of its launches."""
    from ctxkern.runtime.triton import launches

    kept = launches.Launches.run

    def run(self, tensors, device):
        kept(self, tensors, device)
        values = self.values(tensors, device)
        for step in self.steps:
            take(step, values)

    launches.Launches.run = run
    try:
        fn()
    finally:
        launches.Launches.run = kept


def stage_kernels(args):
    """Each kernel of a call by itself."""
    from ctxkern.runtime.triton.launches import stream_of

    for name, (case, n) in _cases(args).items():
        for direction, fn in _calls(args, case, n).items():
            total, device = collections.OrderedDict(), torch.device(args.device, 0 if args.device == "cuda" else None)

            def take(step, values, total=total, device=device):
                took = _seconds(args, lambda: step.launch(values, stream_of(device), False))
                entry = total.setdefault(step.name, [0, 0.0, step.grid])
                entry[0] += 1
                entry[1] += took

            _steps(fn, take)
            alone, whole = sum(took for _, took, _ in total.values()), _seconds(args, fn)
            count = sum(count for count, *_ in total.values())
            print(
                f"{name} {direction}: {count} launches, {alone * 1e3:.3f} ms, whole call {whole * 1e3:.3f} ms",
                flush=True,
            )
            for kernel, (count, took, grid) in total.items():
                flops, moved = _needed(case, n).get(kernel, (0, 0))
                rates = f"{flops / took / 1e12:7.1f} TFLOP/s {moved / took / 1e9:7.0f} GB/s"
                print(f"  {kernel:24} x{count:<3} {took * 1e3:8.3f} ms {rates}  first grid {grid}", flush=True)


def stage_workspace(args):
    """Whole calls in CUDA graphs with workspaces of several sizes."""
    sizes = WORKSPACES[: 1 if args.rehearse else None]
    for name, (case, n) in _cases(args).items():
        for direction in ("fwd", "bwd"):
            row = [f"{m} MiB {_graph_ms(args, _calls(args, case, n, m << 20)[direction]):.3f}" for m in sizes]
            print(f"{name} {direction}, ms: {', '.join(row)}", flush=True)


def stage_tiles(args):
    """The largest products with larger tiles than the table's."""
    from ctxkern.runtime.triton.tiles import Tile

    some = (
        None,
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 4, 4),
    )
    for kernel, direction in (("panel_y", "fwd"), ("panel_g", "bwd")):
        for tile in some[: 2 if args.rehearse else None]:
            with force(tiles={kernel: Tile(*tile)} if tile else None):
                for name in ("price", "qkv"):
                    case, n = _cases(args)[name]
                    try:
                        found = f"{_graph_ms(args, _calls(args, case, n, 128 << 20)[direction]):.3f} ms"
                    except Exception as error:
                        found = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                    print(f"{kernel} {name} {tile or 'of the table'}: {found}", flush=True)


def stage_overlap(args):
    """The weights of one strip while another is projected, on two streams."""
    from ctxkern.runtime.triton.launches import stream_of

    case, n = _cases(args)["qkv"]
    found = []
    _steps(_calls(args, case, n)["fwd"], lambda step, values: found.append((step, values)))
    (weights, given), (y, _) = found[:2]
    if args.device == "cpu":
        return print("no streams on the CPU")
    largest = max((t for t in given if isinstance(t, torch.Tensor) and t.dim() == 1), key=torch.Tensor.numel)
    other = [torch.empty_like(t) if t is largest else t for t in given]
    main, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    device = torch.device("cuda", torch.cuda.current_device())

    def make(stream=None):
        weights.launch(other, stream or stream_of(device), False)

    def both():
        side.wait_stream(main)
        make(side.cuda_stream)
        y.launch(given, stream_of(device), False)
        main.wait_stream(side)

    alone = _seconds(args, make), _seconds(args, lambda: y.launch(given, stream_of(device), False))
    took = [f"{seconds * 1e3:.4f}" for seconds in (*alone, _seconds(args, both))]
    return print("a strip of qkv, ms: panel_weights {}, panel_y {}, both on two streams {}".format(*took))


STAGES = {
    "products": stage_products,
    "kernels": stage_kernels,
    "workspace": stage_workspace,
    "overlap": stage_overlap,
    "tiles": stage_tiles,
}
