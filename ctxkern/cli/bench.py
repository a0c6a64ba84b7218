"""`ctxkern bench`: the fused layer compared with its peers at a shape you choose, as a readable table."""

import argparse
import dataclasses
from typing import Any

from ctxkern.dtypes import NAMES, by_name


def add_parser(subparsers: Any) -> None:
    """Register `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="time the fused layer against its peers at your own shape",
        description="Times modulated_linear against the einsum, the best PyTorch form and a plain linear layer, "
        "interleaved, after checking its result; prints medians, memory and the price over the linear layer.",
    )
    size = _positive
    parser.add_argument("--batch", type=size, default=16, metavar="B", help="sequences (default: %(default)s)")
    parser.add_argument("--seq", type=size, default=128, metavar="S", help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--d-model", type=size, default=256, metavar="D", help="input width (default: %(default)s)")
    parser.add_argument(
        "--d-out", type=size, default=None, metavar="E", help="output width (default: that of the input)"
    )
    parser.add_argument("--context-dim", type=size, default=32, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--contexts", type=size, default=None, metavar="U", help="distinct contexts (default: B)")
    parser.add_argument("--dtype", default="float32", choices=NAMES)
    parser.add_argument(
        "--param-dtype",
        default=None,
        choices=("float32",),
        help="of the parameters, when activations are half precision",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pass", dest="passes", default="both", choices=("forward", "backward", "both"))
    parser.add_argument("--compile", action="store_true", help="torch.compile of the peers too (minutes)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to measure each pass for (default: %(default)s)"
    )
    parser.add_argument(
        "--csv", default=None, metavar="FILE", help="append rows here (default: bench/results, if there)"
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it is {value}; it must be at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    import torch

    from ctxkern.cli import CommandError
    from ctxkern.functional import explain
    from ctxkern.testing import report
    from ctxkern.testing.cases import Case, make_inputs
    from ctxkern.testing.measure import ceilings, device_name

    if args.contexts is not None and args.contexts > args.batch:
        raise CommandError(f"--contexts is {args.contexts}; it must be at most --batch = {args.batch}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device is {args.device}, and torch finds no GPU here")
    case = Case("yours", args.batch, args.seq, args.d_model, args.d_out or args.d_model, args.context_dim)
    if args.contexts is not None:
        index = tuple(b % args.contexts for b in range(args.batch))
        case = dataclasses.replace(case, rows=args.contexts, index=index)
    dtype = by_name(args.dtype)
    inputs = make_inputs(case, dtype, args.param_dtype and by_name(args.param_dtype), args.device)
    peaks = ceilings(dtype, args.device)
    print(
        f"{device_name(args.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads; in this run a large"
    )
    print(f"{args.dtype} product reaches {peaks.flops / 1e9:.0f} GFLOP/s, a copy {peaks.bandwidth / 1e9:.1f} GB/s\n")
    positional, keyword = inputs.arguments()
    print(explain(*positional, **keyword), "\n")
    rows = []
    for backward in (False, True):
        if args.passes in ("both", "backward" if backward else "forward"):
            rows += report.measure_case(
                case, inputs, backward, compiled=args.compile, seconds=args.seconds, peaks=peaks
            )
    print(report.table(rows))
    print("\n× einsum: speed over the einsum.  price: time over one plain shared linear layer on the same x.")
    print("peak MiB: temporary memory beyond inputs, outputs and gradients.")
    print("of floor: what the operations take at the rate of a large product, or the bytes at that of a copy, over the")
    print("time; a linear layer has fewer of both.")
    path = args.csv or report.results_file(args.device)
    if path:
        report.append(rows, path)
        print(f"{len(rows)} rows appended to {path}")
    return 0
