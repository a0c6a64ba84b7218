import torch
from torch import Tensor, nn

import ctxkern
from ctxkern.nn import (
    Bilinear,
    BilinearFactors,
    ContextModulatedAttention,
    DynamicLoraLinear,
    EinsumContextModulatedAttention,
    KVCache,
    ModulatedLinear,
    init_bilinear_,
    init_factors_,
)
from ctxkern.reference import (
    factored_modulated_linear_ref,
    lora_linear_ref,
    modulated_linear_ref,
    modulated_qkv_ref,
)


def calls(x: Tensor, context: Tensor, weight: Tensor, bilinear: Tensor) -> Tensor:
    y: Tensor = ctxkern.modulated_linear(x, context, weight, bilinear)
    q, k, v = ctxkern.modulated_qkv(x, context, [weight] * 3, [bilinear] * 3)
    z: Tensor = ctxkern.bilinear(x, context, bilinear)
    a: Tensor = ctxkern.lora_linear(x, weight, bilinear, bilinear, 0.5)
    f: Tensor = ctxkern.factored_modulated_linear(x, context, weight, weight, weight, weight)
    plan = ctxkern.explain(x, context, weight, bilinear, backward=True)
    low_rank = ctxkern.explain_lora(x, weight, bilinear, bilinear, backward=True)
    seconds: float | None = plan.floor_seconds
    print(plan.strategy, plan.flops, seconds, low_rank.base.upper())
    for name, status in ctxkern.backends().items():
        print(name, bool(status))
    return y + q + k + v + z + a + f


def models(model: nn.Module, context: Tensor) -> nn.Module:
    names: list[str] = ctxkern.swap(model)
    more: list[str] = ctxkern.swap(model, {EinsumContextModulatedAttention: lambda layer: layer})
    print(names, more)
    merged: nn.Module = ctxkern.merge(model, context)
    return merged


def attached(model: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    names: list[str] = ctxkern.attach_contexts(model, 16, ["q_proj", "*.mlp.*"], rank=4)
    names += ctxkern.attach_adapters(model, 8, 4, lambda name, layer: name == "head", alpha=8.0)
    with ctxkern.use(model, context=context, adapter_index=torch.arange(2)):
        y: Tensor = model(x)
    with ctxkern.cache_weights(model, max_bytes=1 << 20, dtype=torch.bfloat16) as cache:
        hits: int = cache.stats().hits
    names += ctxkern.quantize_bilinear(model)
    print(hits, cache.max_contexts)
    ctxkern.save_attached(model, "folder")
    names += ctxkern.load_attached(model, "folder")
    ctxkern.export_adapter(model, 0, "folder")
    ctxkern.import_adapter(model, 1, "folder")
    optimizer = ctxkern.AdapterAdamW(model.parameters(), lr=1e-3, lr_scales=[1.0] * 8, grad_clip=1.0)
    optimizer.step()
    print(names, ctxkern.detach(model, context=context[0], adapter=0))
    return y


def layers(x: Tensor, context: Tensor) -> Tensor:
    attention = ContextModulatedAttention(64, 16, 4, is_causal=True)
    cache = KVCache()
    y: Tensor = attention(x, context, cache=cache)
    linear = ModulatedLinear.from_linear(nn.Linear(64, 64), 16)
    init_bilinear_(linear.bilinear, "hyperfan")
    z: Tensor = linear(x, context)
    w: Tensor = Bilinear(64, 16, 8)(x, context)
    factored = ModulatedLinear(64, 64, 16, rank=4)
    factors = BilinearFactors(64, 64, 16, rank=4)
    init_factors_(*factors.factors(), "hyperfan")
    z = z + factored(x, context) + factors.tensor().sum()
    lora = DynamicLoraLinear(64, 64)
    u: Tensor = lora(x, None, None)
    return y + z + w + u


def references(x: Tensor, context: Tensor, weight: Tensor, bilinear: Tensor) -> Tensor:
    y: Tensor = modulated_linear_ref(x, context, weight, bilinear)
    q, k, v = modulated_qkv_ref(x, context, [weight] * 3, [bilinear] * 3)
    a: Tensor = lora_linear_ref(x, weight, bilinear, bilinear)
    f: Tensor = factored_modulated_linear_ref(x, context, weight, weight, weight, weight)
    return y + q + k + v + a + f


if __name__ == "__main__":
    print(calls(*(torch.randn(2, 2) for _ in range(4))))
