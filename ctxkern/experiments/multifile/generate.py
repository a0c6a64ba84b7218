"""Text from a `MultiFileTransformer`."""

from collections.abc import Sequence

import torch

from ctxkern.experiments.core.generation import generate_answers, generate_tokens
from ctxkern.experiments.core.modes import eval_mode
from ctxkern.experiments.core.tokenizers import Tokenizer
from ctxkern.experiments.multifile.model import MultiFileTransformer


def generate(
    model: MultiFileTransformer,
    inputs: torch.Tensor,
    file_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> torch.Tensor:
    """Continue `inputs` [B, S] int64 in the context of `file_ids` [B] int64, in eval mode.

    Everything else, and what is returned and raised, is that of `ctxkern.experiments.core.generation.generate_tokens`.
    """

    def forward(tokens: torch.Tensor, caches: Sequence, start: int) -> torch.Tensor:
        return model(tokens, file_ids=file_ids, caches=caches, start=start)

    with eval_mode(model):
        return generate_tokens(
            forward, inputs,
            num_layers=len(model.blocks), seq_len=model.config.seq_len, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, eos_id=eos_id, generator=generator, use_cache=use_cache,
        )  # fmt: skip


def generate_text(
    model: MultiFileTransformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    file_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """The targets that the model writes after `prompts`, one for each, up to `<eos>`.

    Prompts of equal token length are run together; prompts longer than the model's `seq_len` keep their end.

    Raises:
        ValueError: not as many `file_ids` as `prompts`; see also `generate`.
    """
    if len(prompts) != len(file_ids):
        raise ValueError(
            f"file_ids has {len(file_ids)} entries; it must have one for each of the {len(prompts)} prompts"
        )
    device = model.token_embeddings.weight.device
    rng = torch.Generator(device).manual_seed(seed % 2**63)

    def run(inputs: torch.Tensor, rows: list[int]) -> torch.Tensor:
        files = torch.tensor([file_ids[i] for i in rows], device=device)
        return generate(
            model, inputs, files,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            eos_id=tokenizer.eos_id, generator=rng,
        )  # fmt: skip

    return generate_answers(run, tokenizer, prompts, device)
