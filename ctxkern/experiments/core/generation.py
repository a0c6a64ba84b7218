"""Text from a causal language model with a KV cache."""

from collections.abc import Callable, Sequence

import torch

from ctxkern.experiments.core.tokenizers import Tokenizer
from ctxkern.nn import KVCache

# (tokens [B, s], caches of the tokens before them, position of the first) -> logits [B, s, V]
Forward = Callable[[torch.Tensor, Sequence[KVCache], int], torch.Tensor]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError where `choose_tokens` would not accept one of these."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, or None")


def choose_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token per row of `logits` [B, V], as [B] int64.

    Args:
        logits: of the next token.
        temperature: 0 takes the likeliest token; otherwise the softmax of `logits / temperature` is sampled.
        top_k: sample from the `top_k` likeliest tokens only.
        top_p: sample from the fewest likeliest tokens whose probabilities sum to `top_p` or more.
        generator: of the sampling, on the device of `logits`.

    Raises:
        ValueError: a negative `temperature`, `top_k` below 1, `top_p` outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    # no temperature may make the likeliest infinite, or nan
    below = logits.float() - logits.float().amax(-1, keepdim=True)
    scaled = below / max(temperature, torch.finfo(torch.float32).tiny)
    ordered, tokens = torch.sort(scaled, dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        # the token that reaches top_p is the last one kept
        probabilities = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, 0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, chosen)[:, 0]


@torch.no_grad()
def generate_tokens(
    forward: Forward,
    inputs: torch.Tensor,
    *,
    num_layers: int,
    seq_len: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    keep: int | None = None,
) -> torch.Tensor:
    """Continue `inputs` token by token.

    When the window of `seq_len` tokens is full, its last `keep` tokens are read again, from position 0 on, and the rest
    is forgotten: keys of absolute positions cannot be moved.

    Args:
        forward: the model, in eval mode: `(tokens [B, s], caches, start)` to logits [B, s, V], where `start` tokens
            are in `caches`.
        inputs: prompts of one length, [B, S] int64, S ≥ 1.
        num_layers: how many caches `forward` takes.
        seq_len: the most positions that `forward` takes.
        max_new_tokens: the most tokens to add.
        temperature, top_k, top_p, generator: see `choose_tokens`.
        eos_id: a row that has produced it repeats it; the call ends when all rows have.
        use_cache: False computes every position again for each token: same tokens, for tests.
        keep: 1 to `seq_len`; None is half of it. With `seq_len` every token from then on sees as many as there can be,
            and is computed without a cache.

    Returns:
        [B, S + n] int64, n ≤ `max_new_tokens`.

    Raises:
        ValueError: an empty prompt, a `keep` outside its range, or from `choose_tokens`.
    """
    if inputs.dim() != 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs has the shape {list(inputs.shape)}; it must be [B, S] with S at least 1")
    check_sampling(temperature, top_k, top_p)
    keep = max(1, seq_len // 2) if keep is None else keep
    if not 1 <= keep <= seq_len:
        raise ValueError(f"keep is {keep}; it must be from 1 to seq_len = {seq_len}, or None")
    tokens, finished = inputs, torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    caches, first, read = None, max(0, inputs.shape[1] - seq_len), 0
    for _ in range(max_new_tokens):
        if tokens.shape[1] - first > seq_len:
            first, caches = tokens.shape[1] - keep, None
        if caches is None or not use_cache:
            caches, read = [KVCache() for _ in range(num_layers)], first
        logits = forward(tokens[:, read:], caches, read - first)[:, -1]
        read = tokens.shape[1]
        chosen = choose_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if eos_id is not None:
            chosen = chosen.masked_fill(finished, eos_id)
            finished |= chosen == eos_id
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        if eos_id is not None and bool(finished.all()):
            break
    return tokens


def generate_answers(
    run: Callable[[torch.Tensor, list[int]], torch.Tensor],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    device: torch.device,
) -> list[str]:
    """The text that follows each of `prompts` and `<sep>`, up to `<eos>`.

    Args:
        run: `(inputs [B, S], positions in prompts of its rows)` to [B, S + n]; called once per length of prompts.
        tokenizer: of prompts and answers.
        prompts: the texts.
        device: of the inputs.
    """
    encoded = [[*tokenizer.encode(prompt), tokenizer.sep_id] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    out = [""] * len(prompts)
    for length, rows in sorted(by_length.items()):
        tokens = run(torch.tensor([encoded[i] for i in rows], device=device), rows)
        for i, row in zip(rows, tokens[:, length:].tolist(), strict=True):
            end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
            out[i] = tokenizer.decode(row[:end])
    return out
