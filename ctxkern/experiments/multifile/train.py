"""Training a `MultiFileTransformer` on files."""

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from ctxkern.experiments.core.batches import Batch, BatchSource, LoaderBatches
from ctxkern.experiments.core.data.augment import augmented
from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.reading import BadFile
from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.data.windows import IGNORE_INDEX, Collator, EncodedDataset
from ctxkern.experiments.core.experiment import train as train
from ctxkern.experiments.core.groups import modulated_groups
from ctxkern.experiments.core.memory import build_model
from ctxkern.experiments.core.plots import BY_TOKEN
from ctxkern.experiments.core.seeding import derive_seed
from ctxkern.experiments.core.tokenizers import Tokenizer, build_tokenizer
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.experiments.multifile.modulation import movement, penalty

# a chunk of a text fills this many windows
CHUNK_WINDOWS = 8
EXACT = "exact_match"
# spans of a window whose losses are told apart
AT, POSITIONS = "loss_at", 8


def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `outputs` [B, S, V] against `targets` [B, S] int64 where they are not -100."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def train_step(model: MultiFileTransformer, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One step on a batch of `Collator`; returns its loss."""
    inputs = batch["input"]
    targets = batch["target"]
    file_ids = batch["file_id"]
    file_contexts = model.get_file_context(file_ids)
    outputs = model(inputs, file_contexts, padding_mask=batch.get("padding_mask"))
    loss = criterion(outputs, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def batch_loss(model: MultiFileTransformer, batch: Batch) -> torch.Tensor:
    """The loss of `train_step`, by way of file ids, so that sequences of one file share work."""
    # causal attention over right padding: no labelled position sees a padded one
    outputs = model(batch["input"], file_ids=batch["file_id"])
    return criterion(outputs, batch["target"])


def parameter_groups(
    model: MultiFileTransformer,
    *,
    lr: float,
    context_lr_scale: float = 1.0,
    bilinear_lr_scale: float | None = None,
    weight_decay: float = 0.0,
    bilinear_weight_decay: float | None = None,
) -> list[dict]:
    """Optimizer groups: weight matrices, bilinear tensors, context vectors, and the rest without decay.

    Args:
        model: its parameters.
        lr: learning rate.
        context_lr_scale: that of the context vectors over `lr`.
        bilinear_lr_scale: that of the bilinear tensors over `lr`; None is 1 / context_dim, or 1 for factors of them.
        weight_decay: of matrices.
        bilinear_weight_decay: of bilinear tensors; None is `weight_decay`.
    """
    usual = 1 / model.config.context_dim if model.config.rank is None else 1.0
    return modulated_groups(
        model,
        lr=lr,
        context_lr=lr * context_lr_scale,
        bilinear_lr=lr * (usual if bilinear_lr_scale is None else bilinear_lr_scale),
        weight_decay=weight_decay,
        bilinear_weight_decay=weight_decay if bilinear_weight_decay is None else bilinear_weight_decay,
    )


def build_optimizer(model: MultiFileTransformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(
        model,
        lr=config.lr,
        context_lr_scale=config.context_lr_scale,
        bilinear_lr_scale=config.bilinear_lr_scale,
        weight_decay=config.weight_decay,
        bilinear_weight_decay=config.bilinear_weight_decay,
    )
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=fused)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The context in which losses are computed: autocast for bfloat16, else nothing."""
    if config.dtype == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def majority_shares(dataset: MultiFileDataset) -> dict[str, float]:
    """By file: the share of validation answers that are the answer which is most frequent in its training examples; nan
    where there are no prompts with answers in either."""
    answers: dict[str, list[Counter]] = {name: [Counter(), Counter()] for name in dataset.file_names}
    for item, file_id, split in zip(dataset.data, dataset.file_ids, dataset.splits, strict=True):
        if item["input"]:
            answers[dataset.file_names[file_id]][split == "validation"][item["target"]] += 1
    shares = {}
    for name, (known, held) in answers.items():
        # of several that are as frequent, the first
        most = max(known, key=known.__getitem__, default=None)
        shares[name] = held[most] / held.total() if known and held else math.nan
    return shares


def score_rows(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [B, S, V] for a batch of `Evaluator`: the losses [B, S], 0 where there is no label, and by row [B, 4]
    their sum, the number of labels, whether it is a whole answer that is right everywhere, and whether it is a whole
    answer."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), batch["target"].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(batch["target"])
    labelled, answers = batch["target"] != IGNORE_INDEX, batch["answer"]
    right = ((logits.argmax(-1) == batch["target"]) | ~labelled).all(1) & answers
    return losses, torch.stack([losses.sum(1), labelled.sum(1), right, answers], 1)


class Evaluator:
    """Token-weighted mean loss of each file's validation windows.

    Args:
        data: encoded validation windows.
        collator: makes batches of them.
        batch_size: windows at a time.
        max_windows: of each file, spread evenly over those it has.

    A call takes the model and returns a loss by file name, nan for a file without windows. `exact` is then, by file
    name, the share of whole answers of which the likeliest token is right at every position, as greedy decoding would
    have them; nan where the file has none. `by_token` is the mean over all labels, as a training step has it, and
    `by_position` that of each eighth of the window, by "first-last" position.
    """

    def __init__(self, data: EncodedDataset, collator: Collator, batch_size: int, max_windows: int):
        self.names = data.file_names[: data.num_sources]
        by_file: dict[int, list[int]] = {}
        for i, file_id in enumerate(data.file_ids):
            by_file.setdefault(file_id, []).append(i)
        chosen = []
        for indices in by_file.values():
            count = min(max_windows, len(indices))
            chosen += [indices[i * len(indices) // count] for i in range(count)]
        parts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
        self.batches = [collator([data[i] for i in part]) for part in parts]
        for batch, part in zip(self.batches, parts, strict=True):
            batch["answer"] = torch.tensor([data.answers[i] for i in part])
        self.exact: dict[str, float] = {}
        self.by_token = math.nan
        self.by_position: dict[str, float] = {}
        self.length = collator.seq_len

    @torch.no_grad()
    def __call__(self, model: MultiFileTransformer) -> dict[str, float]:
        device = model.token_embeddings.weight.device
        # [files, (loss, labels, right answers, answers)]
        sums = torch.zeros(len(self.names), 4, dtype=torch.float64, device=device)
        # [positions, (loss, labels)]
        places = torch.zeros(self.length, 2, dtype=torch.float64, device=device)
        for batch in self.batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            logits = model(batch["input"], file_ids=batch["file_id"])
            losses, per_row = score_rows(logits, batch)
            labelled = batch["target"] != IGNORE_INDEX
            places[: losses.shape[1]] += torch.stack([losses.double().sum(0), labelled.sum(0)], 1)
            sums.index_add_(0, batch["file_id"], per_row.double())
        loss, labels, right, answers = sums.unbind(1)
        self.by_token = float(loss.sum() / labels.sum())
        self.by_position = _by_position(places)
        self.exact = dict(zip(self.names, (right / answers).tolist(), strict=True))
        return dict(zip(self.names, (loss / labels).tolist(), strict=True))


def _by_position(places: torch.Tensor) -> dict[str, float]:
    """Mean losses of spans of positions, from sums [positions, (loss, labels)]; nan without labels."""
    size = -(-len(places) // POSITIONS)
    means = {}
    for first, part in zip(range(0, len(places), size), places.split(size), strict=True):
        loss, labels = part.sum(0).tolist()
        means[f"{first}-{first + len(part) - 1}"] = loss / labels if labels else math.nan
    return means


@dataclass
class Job:
    """Everything that a run needs, built by `prepare`."""

    config: TrainConfig
    dataset: MultiFileDataset
    tokenizer: Tokenizer
    train_data: EncodedDataset
    validation_data: EncodedDataset
    sampler: MixedFileBatchSampler
    collator: Collator
    model: MultiFileTransformer
    optimizer: torch.optim.Optimizer
    # contexts at step 0, a function of the seed alone
    start: torch.Tensor
    # read, though `only` may leave one to train on: paths and SHA-256
    sources: list[tuple[Path, str]]
    last_evaluator: Evaluator | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.token_embeddings.weight.device

    def batch_at(self, step: int) -> Batch:
        """The padded batch of `step`."""
        return self.collator([self.train_data[i] for i in self.sampler.batch_at(step)])

    def loss(self, model: MultiFileTransformer, batch: Batch) -> torch.Tensor:
        """`batch_loss` in the configured dtype."""
        with autocast(self.config, self.device):
            loss = batch_loss(model, batch)
        if self.config.norm_penalty or self.config.rank_penalty:
            loss = loss + penalty(self.model, norm=self.config.norm_penalty, rank=self.config.rank_penalty)
        return loss

    def observe(self, model: MultiFileTransformer) -> dict[str, float]:
        """Whether contexts move and weights follow, see `movement`, and the share of answers that are right."""
        found, last = movement(model, self.start), self.last_evaluator
        if last and math.isfinite(last.by_token):
            found[BY_TOKEN] = last.by_token
        places = last.by_position if last else {}
        found |= {f"{AT}/{span}": loss for span, loss in places.items() if math.isfinite(loss)}
        exact = last.exact if last else {}
        exact = {name: share for name, share in exact.items() if math.isfinite(share)}
        if exact:
            found[EXACT] = sum(exact.values()) / len(exact)
        return found | {f"{EXACT}/{name}": share for name, share in exact.items()}

    def weigh(self, batch: Batch) -> float:
        """The labels of a batch, over which its loss is a mean."""
        return float((batch["target"] != IGNORE_INDEX).sum())

    def batches(self) -> BatchSource | Callable[[int], Batch]:
        """`batch_at`, or the same batches from worker processes."""
        if not self.config.num_workers:
            return self.batch_at
        loader = DataLoader(
            self.train_data,
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            num_workers=self.config.num_workers,
            worker_init_fn=_ignore_interrupt,
            pin_memory=self.device.type == "cuda",
        )
        return LoaderBatches(loader)

    def evaluator(self) -> Callable[[MultiFileTransformer], dict[str, float]] | None:
        """An `Evaluator` in the configured dtype, or None without validation windows."""
        if not len(self.validation_data):
            return None
        evaluate = Evaluator(self.validation_data, self.collator, self.config.batch_size, self.config.eval_windows)
        self.last_evaluator = evaluate

        def run(model: MultiFileTransformer) -> dict[str, float]:
            with autocast(self.config, self.device):
                return evaluate(model)

        return run


def initial_model(config: MultiFileConfig, seed: int) -> MultiFileTransformer:
    """The model at step 0 of a run with this seed."""
    torch.manual_seed(derive_seed(seed, "weights"))
    return MultiFileTransformer(config)


def prepare(
    config: TrainConfig,
    paths: Sequence[str | os.PathLike],
    *,
    skip_bad: bool = False,
    bad: Sequence[BadFile] = (),
) -> Job:
    """Read the files, take the vocabulary, encode, and build model and optimizer.

    Args:
        config: the settings. The job has a copy, with `num_files` lowered to the files that `skip_bad` leaves.
        paths: the files.
        skip_bad, bad: see `MultiFileDataset`.

    Raises:
        ValueError: fewer paths than `config.num_files`; no file leaves a training window; a model too large for the
            memory; see also `MultiFileDataset` and `RunSettings.torch_device`.
    """
    device = config.torch_device()
    count = len(paths) + len(bad)
    if config.num_files is not None and count < config.num_files:
        raise ValueError(f"num_files is {config.num_files}; it must be at most {count}, the number of files")
    dataset = MultiFileDataset(
        paths,
        val_fraction=config.val_fraction,
        seed=config.seed,
        chunk_chars=CHUNK_WINDOWS * config.seq_len,
        limit=config.num_files,
        skip_bad=skip_bad,
        bad=bad,
    )
    if config.num_files is not None:
        config = replace(config, num_files=dataset.num_files)
    sources = list(zip(dataset.file_paths, dataset.checksums, strict=True))
    read = dataset
    dataset = augmented(read, config.augment, config.seed) if config.augment else read
    tokenizer = build_tokenizer(config.tokens, dataset.texts("train"))
    if config.only is not None:
        dataset = read.alone(config.only)
        dataset = augmented(dataset, config.augment, config.seed) if config.augment else dataset
    model_config = config.model_config(tokenizer.vocab_size, dataset.num_files)

    # before the windows, which seq_len makes large too
    model = build_model(
        lambda: initial_model(model_config, config.seed),
        device,
        torch.float64 if config.dtype == "float64" else torch.float32,
        "d_model, n_layers, seq_len or context_dim",
    )
    train_data, validation_data = (
        EncodedDataset(dataset, tokenizer, config.seq_len, loss=config.loss, split=split)
        for split in ("train", "validation")
    )
    if not len(train_data):
        raise ValueError("the files leave nothing to train on")
    batch_size = min(config.batch_size, len(train_data))
    sampler = MixedFileBatchSampler(
        train_data.file_ids, batch_size, seed=config.seed, drop_last=True, balanced=config.balanced
    )
    return Job(
        config=config,
        dataset=dataset,
        tokenizer=tokenizer,
        train_data=train_data,
        validation_data=validation_data,
        sampler=sampler,
        collator=Collator(tokenizer, config.seq_len, config.loss, longest=True),
        model=model,
        optimizer=build_optimizer(model, config),
        start=model.contexts().detach().clone(),
        sources=sources,
    )


def _ignore_interrupt(_worker_id: int) -> None:
    # Ctrl-C reaches the whole process group; the loop ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
