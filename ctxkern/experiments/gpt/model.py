"""A GPT: embeddings of characters and positions, transformer blocks and a head; contexts may modulate attention."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.experiments.core.groups import is_bilinear
from ctxkern.experiments.gpt.config import GPTConfig
from ctxkern.nn import ContextModulatedAttention, KVCache
from ctxkern.nn.block import TransformerBlock
from ctxkern.nn.shared import SharedAttention


class GPT(nn.Module):
    """A causal language model of characters.

    Weights start as N(0, `init_std`²) and biases as zero, so that the first loss is near ln(vocab_size). With
    `context_dim` K, each file has a row of `context_embeddings` (None without), which is scaled to the norm √K and
    modulates the query, key and value weights of all blocks.

    Args:
        config: the sizes.

    Source: the sizes and parts are those of nanoGPT with `norm="pre"`, of the original transformer's decoder with
    "post".

    Example:
        >>> model = GPT(GPTConfig(vocab_size=65, n_layers=1, d_model=16))
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 65])
    """

    context_embeddings: nn.Embedding | None

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = replace(config)
        self.token_embeddings = nn.Embedding(c.vocab_size, c.d_model)
        self.position_embeddings = nn.Embedding(c.block_size, c.d_model)
        self.context_embeddings = nn.Embedding(c.num_files, c.context_dim) if c.context_dim else None
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                c.d_model,
                c.context_dim,
                c.n_heads,
                c.mlp_ratio,
                c.dropout,
                norm=c.norm,
                activation=c.activation,
                residual=c.residual,
                attention=ContextModulatedAttention if c.context_dim else SharedAttention,
                is_causal=True,
                out_proj=c.out_proj,
                out_bias=True,
                rank=c.rank,
            )
            for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model) if c.norm != "none" else None
        self.head = nn.Linear(c.d_model, c.vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as at construction."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if is_bilinear(name) or name.startswith("context_") or "norm" in name:
                continue
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.init_std)

    def contexts(self) -> torch.Tensor | None:
        """The vectors [F, K] of all files, of norm √K, as layers use them; differentiable. None without contexts."""
        if self.context_embeddings is None:
            return None
        return F.normalize(self.context_embeddings.weight) * self.config.context_dim**0.5

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        file_ids: torch.Tensor | None = None,
        contexts: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] of the character after each position.

        Args:
            inputs: ids [B, S] int64.
            file_ids: [B] int64, whose contexts to use; without contexts it is not looked at.
            contexts: [B, K] in place of `file_ids`.
            caches: a `KVCache` for each block; each call appends to them.
            start: position of the first input: the characters before it are in `caches`.

        Raises:
            ValueError: a wrong shape; positions from block_size on; neither or both of `file_ids` and `contexts` where
                there are contexts.
        """
        c = self.config
        if inputs.dim() != 2:
            raise ValueError(f"inputs has the shape {list(inputs.shape)}; it must be [B, S]")
        B, S = inputs.shape
        if start + S > c.block_size:
            raise ValueError(f"inputs reaches position {start + S}; it must be at most block_size = {c.block_size}")
        table, index = self._contexts(B, file_ids, contexts)
        positions = torch.arange(start, start + S, device=inputs.device)
        x = self.dropout(self.token_embeddings(inputs) + self.position_embeddings(positions))
        for i, block in enumerate(self.blocks):
            x = block(x, table, context_index=index, cache=None if caches is None else caches[i])
        return self.head(x if self.norm is None else self.norm(x))

    def _contexts(
        self, batch: int, file_ids: torch.Tensor | None, contexts: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The table of contexts and the rows of it that the sequences have."""
        if self.context_embeddings is None:
            return None, None
        if (file_ids is None) == (contexts is None):
            got = "neither file_ids nor contexts is" if contexts is None else "both file_ids and contexts are"
            raise ValueError(f"{got} given; exactly one of them must be")
        if contexts is not None:
            takes = (batch, self.config.context_dim)
            if contexts.shape != takes:
                raise ValueError(f"contexts has the shape {list(contexts.shape)}; it must be [B, K] = {list(takes)}")
            return contexts, None
        assert file_ids is not None
        if file_ids.shape != (batch,):
            raise ValueError(f"file_ids has the shape {list(file_ids.shape)}; it must be [B] = [{batch}]")
        return self.contexts(), file_ids

    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())
