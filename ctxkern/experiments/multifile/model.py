"""A causal transformer whose attention is modulated by a learned vector of each file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention
from ctxkern.nn.block import TransformerBlock

ATTENTION = {"fused": ContextModulatedAttention, "einsum": EinsumContextModulatedAttention}
INITS = ("normal", "hyperfan", "low_rank", "randn")
ADD_FILE_INITS = ("mean", "normal")
# 0.2 trained faster than 0.02 and 0.5 (200 steps of the default run: 2.34 against 2.40 and 2.38)
_EMBEDDING_STD = 0.2
# logits near 0: the first loss is ln(vocab_size)
_HEAD_STD = 0.02


@dataclass
class MultiFileConfig:
    """Sizes of a :class:`MultiFileTransformer`.

    Attributes:
        vocab_size, num_files: rows of the token and context embeddings.
        d_model, n_heads, n_layers, mlp_ratio: of the transformer.
        context_dim: K, the length of a file's vector.
        seq_len: the most positions.
        dropout: in training.
        init: of the bilinear tensors, see :class:`ctxkern.nn.ContextModulatedAttention`.
        attention: ``"fused"``, or ``"einsum"`` for the same layer in plain einsum form.
    """

    vocab_size: int
    num_files: int
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    context_dim: int = 16
    seq_len: int = 128
    mlp_ratio: float = 4
    dropout: float = 0.0
    init: str = "normal"
    attention: str = "fused"

    def __post_init__(self):
        for name in ("vocab_size", "num_files", "d_model", "n_heads", "n_layers", "context_dim", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, takes an integer of at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads: got {self.n_heads}, takes a divisor of d_model, which is {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, takes a share in [0, 1)")
        for name, choices in (("init", INITS), ("attention", tuple(ATTENTION))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {choices}")


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_EMBEDDING_STD)


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_HEAD_STD)


class MultiFileTransformer(nn.Module):
    """Token and position embeddings, ``n_layers`` blocks of context-modulated attention, a norm and a head.

    Each file has a row of ``context_embeddings``; every block's query, key and value weights are the base weights plus
    the bilinear tensors contracted with that row.
    """

    def __init__(self, config: MultiFileConfig):
        super().__init__()
        # a copy: add_file changes it
        self.config = c = replace(config)
        self.token_embeddings = _Embedding(c.vocab_size, c.d_model)
        self.position_embeddings = _Embedding(c.seq_len, c.d_model)
        self.context_embeddings = nn.Embedding(c.num_files, c.context_dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                c.d_model,
                c.context_dim,
                c.n_heads,
                c.mlp_ratio,
                c.dropout,
                attention=ATTENTION[c.attention],
                is_causal=True,
                init=c.init,
            )
            for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model)
        self.head = _Head(c.d_model, c.vocab_size, bias=False)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as at construction."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def get_file_context(self, file_ids: torch.Tensor) -> torch.Tensor:
        """The vectors [B, K] of ``file_ids`` [B] int64; differentiable."""
        return self.context_embeddings(file_ids)

    def forward(
        self,
        inputs: torch.Tensor,
        contexts: torch.Tensor | None = None,
        *,
        file_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        caches: Sequence | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] of the token after each position.

        Args:
            inputs: token ids [B, S] int64.
            contexts: [B, K], from :meth:`get_file_context` or of the caller's own.
            file_ids: [B] int64 instead of ``contexts``; sequences of one file then share the work on its weights.
            padding_mask: [B, S] bool, True at padding.
            caches: a :class:`ctxkern.nn.KVCache` for each block; each call appends to them.
            start: position of the first input: the tokens before it are in ``caches``.

        Raises:
            ValueError: neither or both of ``contexts`` and ``file_ids`` (neither will do after :func:`ctxkern.merge`);
                a wrong shape; too many positions.
        """
        merged = not any(hasattr(block.attention, "bilinear_q") for block in self.blocks)
        if (contexts is None) == (file_ids is None) and not (merged and contexts is None):
            got = "neither" if contexts is None else "both"
            raise ValueError(f"contexts, file_ids: got {got}, takes exactly one of them")
        if inputs.dim() != 2:
            raise ValueError(f"inputs: got the shape {tuple(inputs.shape)}, takes [B, S]")
        B, S = inputs.shape
        if start + S > self.config.seq_len:
            raise ValueError(f"inputs: got {start + S} positions, the model has seq_len {self.config.seq_len}")
        if contexts is not None:
            if contexts.shape != (B, self.config.context_dim):
                expected = [B, self.config.context_dim]
                raise ValueError(f"contexts: got the shape {tuple(contexts.shape)}, takes {expected}")
            context, index = contexts, None
        elif file_ids is None:
            context = index = None
        else:
            if file_ids.shape != (B,):
                raise ValueError(f"file_ids: got the shape {tuple(file_ids.shape)}, takes [{B}]")
            context, index = self.context_embeddings.weight, file_ids
        positions = torch.arange(start, start + S, device=inputs.device)
        x = self.dropout(self.token_embeddings(inputs) + self.position_embeddings(positions))
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, context, context_index=index, key_padding_mask=padding_mask, cache=cache)
        return self.head(self.norm(x))

    @torch.no_grad()
    def add_file(self, init: str | torch.Tensor = "mean") -> int:
        """Add a context vector and return its file id; the others keep their bits.

        ``context_embeddings.weight`` becomes a new parameter: build optimizers afterwards.

        Args:
            init: ``"mean"`` of the present vectors, ``"normal"`` for N(0, 1), or a tensor [K].

        Raises:
            ValueError: another ``init``.
        """
        old = self.context_embeddings.weight
        if isinstance(init, torch.Tensor):
            if init.shape != old.shape[1:]:
                raise ValueError(f"init: got the shape {tuple(init.shape)}, takes [{old.shape[1]}]")
            row = init.to(old)[None]
        elif init == "mean":
            row = old.mean(0, keepdim=True)
        elif init == "normal":
            row = torch.randn_like(old[:1])
        else:
            raise ValueError(f"init: got {init!r}, takes a tensor or one of {ADD_FILE_INITS}")
        self.context_embeddings = nn.Embedding.from_pretrained(torch.cat([old, row]), freeze=not old.requires_grad)
        self.config.num_files += 1
        return self.config.num_files - 1

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``base``, ``bilinear``, ``context`` and their ``total``."""
        counts = dict.fromkeys(("base", "bilinear", "context"), 0)
        for name, parameter in self.named_parameters():
            kind = "context" if name.startswith("context_") else "bilinear" if is_bilinear(name) else "base"
            counts[kind] += parameter.numel()
        return counts | {"total": sum(counts.values())}

    def with_attention(self, attention: str) -> "MultiFileTransformer":
        """A copy with equal weights whose attention is ``"fused"`` or ``"einsum"``."""
        copy = MultiFileTransformer(MultiFileConfig(**{**asdict(self.config), "attention": attention}))
        weight = self.token_embeddings.weight
        copy.to(device=weight.device, dtype=weight.dtype).load_state_dict(self.state_dict())
        return copy.train(self.training)


def is_bilinear(name: str) -> bool:
    """Whether a parameter of this name is one of the bilinear tensors."""
    return name.rpartition(".")[2].startswith("bilinear_")
