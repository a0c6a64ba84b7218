"""Rates of neighbouring sizes: what falls where nothing should, and a table of few cases hides.

    python bench/sweep.py context_dim bfloat16      # widths, contexts, rank (of lora_linear), lora_width; float32

GFLOP/s of the operations that the work asks for, forward and with the backward. A rate below 0.9 of the mean of both
neighbours is marked: read it again before you believe it.
"""

import argparse
from statistics import mean

import torch

from ctxkern import lora_linear
from ctxkern.testing import lora_peers, peers
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import interleaved

ROWS = 2048
SIZES = {
    "context_dim": (4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128),
    "widths": (96, 128, 192, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1000, 1024, 1152, 1280, 1536),
    "contexts": (1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 256),
    "rank": (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256),
    "lora_width": (256, 384, 500, 512, 640, 768, 1000, 1024, 1280, 1536, 2000, 2048, 2304),
}


def modulated(contexts, width, context_dim, dtype):
    """(FLOPs, callable) of the forward, and of both passes."""
    case = Case("sweep", contexts, ROWS // contexts, width, width, context_dim)
    inputs = make_inputs(case, dtype, dtype)
    flops = 2 * ROWS * width**2 + 2 * contexts * width**2 * context_dim
    return [(flops * (3 if both else 1), peers.calls(inputs, both)["ctxkern"]) for both in (False, True)]


def lora(width, rank, dtype):
    """The same of `lora_linear` without a base, whose products are torch's: two thin products and six."""
    x, _, A, B, dy = lora_peers.inputs_of(lora_peers.LoraCase(16, ROWS // 16, width, rank), dtype)
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def forward():
        return lora_linear(x, None, A, B, lora_peers.SCALE)

    flops = 4 * ROWS * width * rank
    return [(flops, torch.no_grad()(forward)), (3 * flops, lambda: torch.autograd.grad(forward(), leaves, dy))]


MADE = {
    "context_dim": lambda size, dtype: modulated(16, 512, size, dtype),
    "widths": lambda size, dtype: modulated(8, size, 32, dtype),
    "contexts": lambda size, dtype: modulated(size, 512, 64, dtype),
    "rank": lambda size, dtype: lora(1024, size, dtype),
    "lora_width": lambda size, dtype: lora(size, 16, dtype),
}


def rates(along, dtype, sizes, seconds):
    """{size: [GFLOP/s of the forward, of both passes]}."""
    made = {size: MADE[along](size, dtype) for size in sizes}
    calls = {(size, i): fn for size, each in made.items() for i, (_, fn) in enumerate(each)}
    taken = interleaved(calls, seconds)
    return {
        size: [flops / taken[size, i].p50 / 1e9 for i, (flops, _) in enumerate(each)] for size, each in made.items()
    }


def marked(found):
    """The sizes with a rate below 0.9 of the mean of both neighbours."""
    sizes, low = list(found), set()
    for before, at, after in zip(sizes, sizes[1:], sizes[2:], strict=False):
        around = [mean(pair) for pair in zip(found[before], found[after], strict=True)]
        if any(rate < 0.9 * between for rate, between in zip(found[at], around, strict=True)):
            low.add(at)
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("along", choices=SIZES)
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all sizes together")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = rates(args.along, getattr(torch, args.dtype), SIZES[args.along], args.seconds)
    low = marked(found)
    for size, each in found.items():
        print(f"{size:>6} " + " ".join(f"{rate:8.1f}" for rate in each) + ("   <" if size in low else ""))


if __name__ == "__main__":
    main()
