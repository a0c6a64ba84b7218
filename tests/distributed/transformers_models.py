"""A transformers model that its own tensor-parallel plan shards gets contexts and adapters."""

import torch
import transformers
from helpers.attached import K, N, R
from helpers.processes import fill, full, same_on_all
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import ctxkern

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 4], [11, 5, 30, 8]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "*.mlp.*_proj"]
INDEX, TABLE = torch.tensor([2, 0, 1]), same_on_all(N, K, seed=5, dtype=torch.float64)


def save(_rank, _world, folder):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        num_key_value_heads=2, vocab_size=40, initializer_range=0.4, eos_token_id=None, **sizes
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")


def attach(model, kind):
    if kind == "adapters":
        ctxkern.attach_adapters(model, N, R, TARGETS)
    else:
        ctxkern.attach_contexts(model, K, TARGETS, rank=R if kind == "factors" else None)
    return fill(model.eval())


def run(model, kind):
    """(loss, gradients, tokens that follow)."""
    how = {"adapter_index": INDEX} if kind == "adapters" else {"context": TABLE, "context_index": INDEX}
    with ctxkern.use(model, **how):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        following = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return full(loss).detach(), found, following


def by_its_own_plan(rank, world, folder):
    if rank == 0:
        save(rank, world, folder)
    torch.distributed.barrier()
    plan = DistributedConfig(tp_size=world)
    for kind in ("contexts", "factors", "adapters"):
        whole = attach(transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64), kind)
        split = transformers.LlamaForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float64, distributed_config=plan
        )
        assert isinstance(split.model.layers[0].self_attn.q_proj.weight, DTensor)
        attach(split, kind)
        torch.testing.assert_close(run(split, kind), run(whole, kind))
        how = {"adapter": 1} if kind == "adapters" else {"context": TABLE[0]}
        for model in (whole, split):
            ctxkern.detach(model, **how)
        with torch.no_grad():
            torch.testing.assert_close(full(split(TOKENS).logits), whole(TOKENS).logits)
