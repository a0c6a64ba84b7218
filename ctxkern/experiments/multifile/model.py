"""A causal transformer whose attention is modulated by a learned vector of each file."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.experiments.core.groups import is_bilinear
from ctxkern.experiments.core.settings import Settings, setting
from ctxkern.experiments.multifile.forms import (
    ATTENTION,
    BILINEAR,
    FILM,
    FORMS,
    NORMED,
    attention_class,
    context_width,
    draw_contexts_,
)
from ctxkern.nn.block import TransformerBlock

INITS = ("normal", "hyperfan", "low_rank", "randn")
ADD_FILE_INITS = ("mean", "normal")
# 0.2 trained faster than 0.02 and 0.5 (200 steps of the default run: 2.34 against 2.40 and 2.38)
_EMBEDDING_STD = 0.2
# logits near 0: the first loss is ln(vocab_size)
_HEAD_STD = 0.02


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """Sizes of a `MultiFileTransformer` that do not depend on the data.

    Raises:
        ValueError: a value that a setting does not accept; `d_model` is not a multiple of `n_heads`.
    """

    d_model: int = setting(128, "width of the model", at_least=1, group="model")
    n_heads: int = setting(4, "attention heads, a divisor of the width", at_least=1, group="model")
    n_layers: int = setting(2, "transformer blocks", at_least=1, group="model")
    context_dim: int = setting(16, "length of a file's context vector", at_least=1, group="model")
    form: str = setting("bilinear", "how the context of a file enters", choices=tuple(FORMS), group="model")
    lora_rank: int = setting(4, "rank of the weights of each file, of the form lora", at_least=1, group="model")
    context_std: float = setting(
        0.02, "standard deviation of the contexts at step 0, of the forms token and added", at_least=0, group="model"
    )
    rank: int | None = setting(
        None,
        "keep bilinear tensors by CP factors of this rank",
        at_least=1,
        default_text="the whole tensors",
        group="model",
    )
    seq_len: int = setting(128, "tokens per sequence, at most", at_least=1, group="model")
    dropout: float = setting(0.0, "share dropped in training", at_least=0, below=1, group="model")
    context_norm: bool = setting(True, "scale every context to the norm √K wherever it is used", group="model")
    context_dropout: float = setting(
        0.0,
        "share of sequences that train without context, so that the base serves unknown files",
        at_least=0,
        below=1,
        group="model",
    )
    init: str = setting("normal", "how the bilinear tensors start", choices=INITS, group="model")
    attention: str = setting(
        "fused", "the fused layer, or the same in plain einsum form", choices=tuple(ATTENTION), group="model"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must be a divisor of d_model = {self.d_model}")
        if self.rank is not None and self.form not in BILINEAR:
            raise ValueError(f"rank is {self.rank}; it must be None for the form {self.form}, see lora_rank")

    @property
    def context_width(self) -> int:
        """The entries of a file's context: `context_dim`, or what its form takes."""
        return context_width(
            self.form,
            context_dim=self.context_dim,
            d_model=self.d_model,
            n_layers=self.n_layers,
            lora_rank=self.lora_rank,
        )


@dataclass
class MultiFileConfig(ModelSettings):
    """Everything that a `MultiFileTransformer` is built from: `vocab_size` and `num_files` are the rows of the token
    and context embeddings, `mlp_ratio` is the width of the hidden layer divided by `d_model`."""

    vocab_size: int = setting(MISSING, "rows of the token embeddings", at_least=1)
    num_files: int = setting(MISSING, "rows of the context embeddings", at_least=1)
    mlp_ratio: float = field(default=4, kw_only=True)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_EMBEDDING_STD)


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_HEAD_STD)


class _Contexts(nn.Embedding):
    def __init__(self, config: MultiFileConfig):
        self.config = config
        super().__init__(config.num_files, config.context_width)

    def reset_parameters(self) -> None:
        c = self.config
        draw_contexts_(self.weight, c.form, std=c.context_std, d_model=c.d_model, lora_rank=c.lora_rank)


class MultiFileTransformer(nn.Module):
    """Token and position embeddings, `n_layers` blocks of context-modulated attention, a norm and a head.

    Each file has a row of `context_embeddings` (None where the form is "none"); every block's query, key and value
    weights are the base weights plus the bilinear tensors contracted with that row, or the row enters as another `form`
    says.
    """

    context_embeddings: nn.Embedding | None

    def __init__(self, config: MultiFileConfig):
        super().__init__()
        # a copy: add_file changes it
        self.config = c = replace(config)
        self.token_embeddings = _Embedding(c.vocab_size, c.d_model)
        self.position_embeddings = _Embedding(c.seq_len, c.d_model)
        width = c.context_width
        # the draws of a model with bilinear tensors stay those of before there were forms
        self.context_embeddings = _Contexts(c) if c.form in BILINEAR else None
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                c.d_model,
                width // c.n_layers if c.form == "lora" else width,
                c.n_heads,
                c.mlp_ratio,
                c.dropout,
                film=c.form in FILM,
                attention=attention_class(c.form, c.attention),
                is_causal=True,
                rank=c.rank,
                init=c.init,
            )
            for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model)
        self.head = _Head(c.d_model, c.vocab_size, bias=False)
        if width and c.form not in BILINEAR:
            self.context_embeddings = _Contexts(c)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as at construction."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def contexts(self) -> torch.Tensor:
        """The vectors [F, K] of all files, as layers use them; differentiable. K is the config's `context_width`."""
        if self.context_embeddings is None:
            return self.token_embeddings.weight.new_empty(self.config.num_files, 0)
        return self.scaled(self.context_embeddings.weight)

    def scaled(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [F, K] at the norm that contexts are used with; zeros stay zeros."""
        normed = self.config.context_norm and self.config.form in NORMED
        return F.normalize(vectors) * self.config.context_dim**0.5 if normed else vectors

    def get_file_context(self, file_ids: torch.Tensor) -> torch.Tensor:
        """The vectors [B, K] of `file_ids` [B] int64; differentiable."""
        return self.contexts()[file_ids]

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
            contexts: [B, K], from `get_file_context` or other vectors.
            file_ids: [B] int64 instead of `contexts`; sequences of one file then share the work on its weights.
            padding_mask: [B, S] bool, True at padding.
            caches: a `ctxkern.nn.KVCache` for each block; each call appends to them.
            start: position of the first input: the tokens before it are in `caches`.

        Raises:
            ValueError: neither or both of `contexts` and `file_ids` (neither will do after `ctxkern.merge`);
                a wrong shape; too many positions.
        """
        # after ctxkern.merge
        merged = (
            self.config.form == "none"
            or self.config.form == "bilinear"
            and not any(hasattr(b.attention, "bilinear_q") for b in self.blocks)
        )
        if (contexts is None) == (file_ids is None) and not (merged and contexts is None):
            got = "neither contexts nor file_ids is" if contexts is None else "both contexts and file_ids are"
            raise ValueError(f"{got} given; exactly one of them must be")
        if inputs.dim() != 2:
            raise ValueError(f"inputs has the shape {list(inputs.shape)}; it must be [B, S]")
        B, S = inputs.shape
        if start + S > self.config.seq_len:
            raise ValueError(f"inputs reaches position {start + S}; it must be at most seq_len = {self.config.seq_len}")
        context: torch.Tensor | None
        index: torch.Tensor | None
        if contexts is not None:
            if contexts.shape != (B, self.config.context_width):
                expected = [B, self.config.context_width]
                raise ValueError(f"contexts has the shape {list(contexts.shape)}; it must be [B, K] = {expected}")
            context, index = contexts, None
        elif file_ids is None:
            context = index = None
        else:
            if file_ids.shape != (B,):
                raise ValueError(f"file_ids has the shape {list(file_ids.shape)}; it must be [B] = [{B}]")
            context, index = self.contexts(), file_ids
        if self.training and self.config.context_dropout and context is not None:
            context, index = self._drop(context, index)
        positions = torch.arange(start, start + S, device=inputs.device)
        x = self.token_embeddings(inputs) + self.position_embeddings(positions)
        form, parts = self.config.form, [context] * len(self.blocks)
        if context is not None and form in ("token", "added"):
            vectors = (context if index is None else context[index])[:, None]
            x = x + vectors if form == "added" else torch.cat([vectors, x], 1) if start == 0 else x
            if form == "token" and padding_mask is not None:
                padding_mask = F.pad(padding_mask, (1, 0))
        if context is not None and form == "lora":
            parts = list(context.chunk(len(self.blocks), 1))
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, parts[i], context_index=index, key_padding_mask=padding_mask, cache=cache)
        # without the file's own token
        return self.head(self.norm(x[:, -S:]))

    def _drop(self, context: torch.Tensor, index: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros in place of the contexts of some sequences, as one more row of the table."""
        rows = torch.arange(len(context), device=context.device) if index is None else index
        none = torch.rand(rows.shape, device=rows.device) < self.config.context_dropout
        table = torch.cat([context, context.new_zeros(1, context.shape[1])])
        return table, torch.where(none, len(context), rows)

    @torch.no_grad()
    def add_file(self, init: str | torch.Tensor = "mean") -> int:
        """Add a context vector and return its file id; the others keep their bits.

        `context_embeddings.weight` becomes a new parameter: build optimizers afterwards.

        Args:
            init: `"mean"` of the present vectors, `"normal"` for one drawn as at step 0, or a tensor [K].

        Raises:
            ValueError: another `init`.
        """
        if self.context_embeddings is None:
            self.config.num_files += 1
            return self.config.num_files - 1
        old = self.context_embeddings.weight
        if isinstance(init, torch.Tensor):
            if init.shape != old.shape[1:]:
                raise ValueError(f"init has the shape {list(init.shape)}; it must be [K] = [{old.shape[1]}]")
            row = init.to(old)[None]
        elif init == "mean":
            row = self.contexts().mean(0, keepdim=True).to(old)
        elif init == "normal":
            c = self.config
            row = torch.empty_like(old[:1])
            draw_contexts_(row, c.form, std=c.context_std, d_model=c.d_model, lora_rank=c.lora_rank)
        else:
            raise ValueError(f"init is {init!r}; it must be a tensor or one of {', '.join(ADD_FILE_INITS)}")
        self.context_embeddings = nn.Embedding.from_pretrained(torch.cat([old, row]), freeze=not old.requires_grad)
        self.config.num_files += 1
        return self.config.num_files - 1

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: `base`, `bilinear`, `context`, `film` where there is any, and their `total`."""
        counts = dict.fromkeys(("base", "bilinear", "context"), 0)
        for name, parameter in self.named_parameters():
            kind = "context" if name.startswith("context_") else "bilinear" if is_bilinear(name) else "base"
            kind = "film" if "_film." in name else kind
            counts[kind] = counts.get(kind, 0) + parameter.numel()
        return counts | {"total": sum(counts.values())}

    def with_attention(self, attention: str) -> "MultiFileTransformer":
        """A copy with equal weights whose attention is `"fused"` or `"einsum"`."""
        copy = MultiFileTransformer(MultiFileConfig(**{**asdict(self.config), "attention": attention}))
        weight = self.token_embeddings.weight
        copy.to(device=weight.device, dtype=weight.dtype).load_state_dict(self.state_dict())
        return copy.train(self.training)
