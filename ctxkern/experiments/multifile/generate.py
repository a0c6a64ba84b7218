"""Text from a :class:`MultiFileTransformer`."""

from collections.abc import Sequence

import torch

from ctxkern.experiments.core.tokenizers import Tokenizer
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.nn import KVCache


def _pick(logits: torch.Tensor, temperature: float, rng: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=rng)[:, 0]


@torch.no_grad()
def generate(
    model: MultiFileTransformer,
    inputs: torch.Tensor,
    file_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> torch.Tensor:
    """Continue ``inputs`` token by token with a KV cache, in eval mode.

    Past the model's ``seq_len`` the last half of the window is read again and the rest forgotten.

    Args:
        inputs: prompts of one length, [B, S] int64, S ≥ 1.
        file_ids: [B] int64.
        max_new_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token, else the softmax of logits over ``temperature`` is sampled.
        eos_id: a row that produced it goes on with it; all rows having it ends the call.
        generator: of the sampling, on the device of ``inputs``.
        use_cache: False computes every position anew for each token: same tokens, for tests.

    Returns:
        [B, S + n] int64, n ≤ ``max_new_tokens``.

    Raises:
        ValueError: an empty prompt or a negative ``temperature``; see also ``model.forward``.
    """
    if inputs.dim() != 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs: got the shape {tuple(inputs.shape)}, takes [B, S] with S at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, takes 0 or more")
    training, limit = model.training, model.config.seq_len
    model.eval()
    try:
        tokens, finished = inputs, torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        caches, first, read = None, max(0, inputs.shape[1] - limit), 0
        for _ in range(max_new_tokens):
            if tokens.shape[1] - first > limit:
                first, caches = tokens.shape[1] - max(1, limit // 2), None
            if caches is None or not use_cache:
                caches, read = [KVCache() for _ in model.blocks], first
            logits = model(tokens[:, read:], file_ids=file_ids, caches=caches, start=read - first)[:, -1]
            read = tokens.shape[1]
            chosen = _pick(logits, temperature, generator)
            if eos_id is not None:
                chosen = chosen.masked_fill(finished, eos_id)
                finished |= chosen == eos_id
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            if eos_id is not None and bool(finished.all()):
                break
        return tokens
    finally:
        model.train(training)


def generate_text(
    model: MultiFileTransformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    file_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The targets that the model writes after ``prompts``, one of each, up to ``<eos>``.

    Prompts of equal token length are run together; longer ones than the model's ``seq_len`` keep their end.

    Raises:
        ValueError: as many ``file_ids`` as ``prompts`` are needed.
    """
    if len(prompts) != len(file_ids):
        raise ValueError(f"file_ids: got {len(file_ids)}, takes one for each of the {len(prompts)} prompts")
    device = model.token_embeddings.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    encoded = [[*tokenizer.encode(prompt), tokenizer.sep_id] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    out = [""] * len(prompts)
    for length, rows in sorted(by_length.items()):
        inputs = torch.tensor([encoded[i] for i in rows], device=device)
        files = torch.tensor([file_ids[i] for i in rows], device=device)
        tokens = generate(
            model, inputs, files,
            max_new_tokens=max_new_tokens, temperature=temperature, eos_id=tokenizer.eos_id, generator=rng,
        )  # fmt: skip
        for i, row in zip(rows, tokens[:, length:].tolist(), strict=True):
            end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
            out[i] = tokenizer.decode(row[:end])
    return out
