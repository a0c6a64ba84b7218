"""The hypernetwork: prompt → frozen language model → embedding of its last token → A and B of every target layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ctxkern
from ctxkern.attach.layers import AdapterLayer
from ctxkern.attach.peft_files import write_weights
from ctxkern.experiments.core.settings import Settings, setting

Weights = dict[str, tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class TaskWeaverConfig(Settings):
    """What a `TaskWeaver` is built from besides its language model.

    Raises:
        ValueError: a value that a setting does not accept.
    """

    model_name: str = setting(
        "EleutherAI/pythia-70M-deduped", "language model: a folder or a name on the hub", is_path=None
    )
    hidden_dim: int = setting(1024, "width of the hypernetwork", at_least=1)
    lora_rank: int = setting(2, "rank of the weights that it writes", at_least=1)
    lora_alpha: float = setting(16.0, "numerator of their scale, alpha / rank", above=0)
    lora_target_layers: str = setting("query_key_value", "names of the layers that get them, with commas between")

    @property
    def targets(self) -> list[str]:
        """The names of `lora_target_layers`."""
        return [name.strip() for name in self.lora_target_layers.split(",") if name.strip()]


@dataclass(frozen=True)
class Target:
    """A layer that gets weights: its number among the blocks, its kind (by the end of its name), and its widths."""

    layer: int
    kind: int
    d_out: int
    d_in: int


class TaskWeaver(nn.Module):
    """A language model whose target layers have low-rank weights that depend on the prompt.

    The frozen language model reads the prompt, the hidden state of the prompt's last token is projected, and for each
    target layer embeddings of its number, its kind and of which factor is wanted are added; an MLP and a linear map of
    each kind make A [r, D] and B [E, r] of it. The maps to B start at zero, so that at step 0 the model computes what
    the language model does, bit for bit.

    Args:
        lm: a causal language model of transformers. It is changed in place: frozen, and attached to by
            `ctxkern.attach_adapters`.
        config: the sizes.

    Raises:
        ValueError: a target that means no linear layer, or one that is not in a numbered block; as
            `ctxkern.attach_adapters`.

    Source: documents of TaskWeaver; Hu et al., LoRA (2021), for the weights.
    """

    def __init__(self, lm: Any, config: TaskWeaverConfig):
        super().__init__()
        self.config = config
        names = ctxkern.attach_adapters(lm, 0, config.lora_rank, config.targets, alpha=config.lora_alpha)
        self.lm = lm.requires_grad_(False).eval()
        self.targets = _targets(lm, names)
        hidden, d_lm = config.hidden_dim, lm.get_input_embeddings().weight.shape[1]
        kinds = {target.kind: target for target in self.targets.values()}
        self.project = nn.Linear(d_lm, hidden)
        self.layers = nn.Embedding(1 + max(target.layer for target in self.targets.values()), hidden)
        self.kinds = nn.Embedding(len(kinds), hidden)
        self.factors = nn.Embedding(2, hidden)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.GELU(),
        )
        rank = config.lora_rank
        self.to_A = nn.ModuleList(nn.Linear(hidden, rank * kinds[kind].d_in) for kind in sorted(kinds))
        self.to_B = nn.ModuleList(nn.Linear(hidden, kinds[kind].d_out * rank) for kind in sorted(kinds))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the hypernetwork again, as at construction; the language model stays."""
        for module in self.hypernetwork().values():
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        for embedding in (self.layers, self.kinds, self.factors):
            nn.init.normal_(embedding.weight, std=0.02)
        for head in self.to_B:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def hypernetwork(self) -> dict[str, nn.Module]:
        """Its modules by name, those of the language model left out."""
        return {name: module for name, module in self.named_children() if name != "lm"}

    @torch.no_grad()
    def export(self, input_ids: Tensor, folder: str | Path) -> None:
        """Write the weights of a prompt [1, S] as an adapter in PEFT's files.

        Raises:
            ValueError: several prompts.
        """
        if len(input_ids) != 1:
            raise ValueError(f"input_ids has {len(input_ids)} rows; it must have one, the prompt")
        found = self.weights(self.embed(input_ids))
        weights = {name: (A[0].contiguous(), B[0].contiguous()) for name, (A, B) in found.items()}
        write_weights(self.lm, weights, dict.fromkeys(weights, self.config.lora_alpha), folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: the hypernetwork, and of the language model its name and shapes."""
        from ctxkern.experiments.taskweaver.files import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model_name: str | None = None, device: str = "cpu", lm: Any = None
    ) -> "TaskWeaver":
        """What `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: with config.json, and model.safetensors or a pytorch_model.bin, of which no code is run.
            model_name: another language model than config.json names, of the same sizes.
            device: of all of it.
            lm: a language model that is loaded already, in place of both.

        Raises:
            ValueError: files that are missing or damaged; a language model of other sizes.
        """
        from ctxkern.experiments.taskweaver.files import load

        return load(Path(folder), model_name, device, lm)

    def train(self, mode: bool = True) -> "TaskWeaver":
        """Sets the mode of the hypernetwork; the frozen language model stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def parameter_counts(self) -> dict[str, int]:
        """`trainable` and `total` numbers of parameters; tied ones count once."""
        return parameter_counts(self)

    @torch.no_grad()
    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """The frozen model's hidden states [B, D] of each prompt's last token.

        Args:
            input_ids: [B, S] int64, padded on either side.
            attention_mask: [B, S], 0 at padding; None: nothing is padded.
            prompt_lengths: [B] int64, how many tokens of each row, padding not counted, are its prompt; None: all.

        Raises:
            ValueError: a prompt without tokens, or longer than its row.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        counts = mask.sum(1)
        lengths = counts if prompt_lengths is None else prompt_lengths
        if bool(((lengths < 1) | (lengths > counts)).any()):
            raise ValueError(
                f"prompt_lengths is {lengths.tolist()}; each must be at least 1 and at most the tokens of its row, "
                f"{counts.tolist()}"
            )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # of each row the place where so many tokens have come
        last = ((positions == lengths[:, None] - 1) & (mask == 1)).int().argmax(1)
        stop = int(last.max()) + 1
        with ctxkern.use(self.lm):
            hidden = self.lm.base_model(
                input_ids=input_ids[:, :stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, :stop],
                use_cache=False,
            ).last_hidden_state
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def weights(self, embeddings: Tensor) -> Weights:
        """A [B, r, D] and B [B, E, r] of each target layer by name, of prompts' embeddings [B, D]; differentiable."""
        prompt = self.project(embeddings.to(self.project.weight.dtype))
        rank, found = self.config.lora_rank, {}
        for name, target in self.targets.items():
            place = prompt + self.layers.weight[target.layer] + self.kinds.weight[target.kind]
            A, B = (
                head[target.kind](self.mlp(place + self.factors.weight[number]))
                for number, head in enumerate((self.to_A, self.to_B))
            )
            found[name] = A.unflatten(1, (rank, target.d_in)), B.unflatten(1, (target.d_out, rank))
        return found

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        embeddings: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """What the language model gives for `input_ids` [B, S], each row in the weights of its prompt.

        Args:
            input_ids, attention_mask, prompt_lengths: as in `embed`.
            labels: [B, S] int64, -100 where there is no loss; None: no loss.
            embeddings: [B, D], of `embed`, if they are known.
            more: for the language model.
        """
        if embeddings is None:
            embeddings = self.embed(input_ids, attention_mask, prompt_lengths)
        with ctxkern.use(self.lm, lora=self.weights(embeddings)):
            return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> Tensor:
        """Tokens [B · n, T] that continue each prompt of `input_ids` [B, S] in the weights of its prompt.

        Prompts of several lengths are padded on the left. `how` is for transformers' `generate`; a temperature asks for
        sampling, unless `do_sample` says otherwise.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if how.get("max_new_tokens"):
            check_positions(self.lm, "max_new_tokens after the prompts", input_ids.shape[1] + how["max_new_tokens"])
        if how.get("temperature"):
            how.setdefault("do_sample", True)
        elif "temperature" in how:
            del how["temperature"]
        if self.lm.generation_config.pad_token_id is None and "pad_token_id" not in how:
            end: Any = self.lm.generation_config.eos_token_id
            how["pad_token_id"] = end[0] if isinstance(end, (list, tuple)) else end
        with ctxkern.use(self.lm, lora=self.weights(self.embed(input_ids, mask))):
            return self.lm.generate(input_ids=input_ids, attention_mask=mask, **how)


def check_positions(lm: Any, name: str, tokens: int) -> None:
    """Raise where a language model with learned positions has fewer than `tokens`, which `name` asks for.

    Raises:
        ValueError: it has.
    """
    most = getattr(lm.config, "max_position_embeddings", None)
    others = (m for m in lm.base_model.modules() if isinstance(m, nn.Embedding) and m is not lm.get_input_embeddings())
    if most is not None and tokens > most and any(other.num_embeddings >= most for other in others):
        raise ValueError(f"{name}: {tokens} tokens; they must be at most {most}, the positions of the language model")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """`trainable` and `total` numbers of parameters; tied ones count once."""
    everything = list(model.parameters())
    trainable = sum(p.numel() for p in everything if p.requires_grad)
    return {"trainable": trainable, "total": sum(p.numel() for p in everything)}


def _targets(lm: nn.Module, names: Sequence[str]) -> dict[str, Target]:
    """The target layers by name. A kind is the name below the number of the block."""
    kinds: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    found = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        if match is None:
            raise ValueError(f"lora_target_layers has {name!r}, which is in no numbered block; it must be in one")
        layer = lm.get_submodule(name)
        assert isinstance(layer, AdapterLayer)
        shape = (layer.out_in.shape[0], layer.out_in.shape[1])
        kind = match[2]
        if shapes.setdefault(kind, shape) != shape:
            raise ValueError(
                f"layer {name!r} has the weight {list(shape)}; it must be {list(shapes[kind])}, as in other blocks"
            )
        found[name] = Target(int(match[1]), kinds.setdefault(kind, len(kinds)), *shape)
    return found
