"""Characters of texts for a model: a vocabulary, a training and a validation part of each text, random batches."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.chunks import Span, TextFile
from ctxkern.experiments.core.data.dataset import SPLITS, display_names
from ctxkern.experiments.core.data.reading import BadFile, BadFilesError
from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.core.names import join_names, one_line, printable
from ctxkern.experiments.core.tokenizers import Alphabet

_MOST_NAMED = 12
# draws of windows in a row that have nothing to predict
_MOST_EMPTY = 1000


class CharData:
    """Texts, memory-mapped, and batches of their characters.

    Args:
        paths: the texts, in UTF-8.
        vocab: the text whose characters are the vocabulary; None: the characters of the texts.
        val_fraction: the share of each text, its end, that is set apart.
        val_file: the text to validate on, instead.
        skip_bad: leave out texts that cannot be read.
        bad: files already known to be bad.

    Attributes:
        files, names: the texts and what they are called; `validated` are the names of what there is to validate on.
        spans, sizes: by split, the part of each text and its bytes, 0 where it has nothing to predict.
        tokenizer: of all texts.
        notes: (name, note) on what of a text is not used.

    Raises:
        BadFilesError: texts that cannot be read, all of them at once.
        OSError, ValueError: `vocab` or `val_file` cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        vocab: str | os.PathLike | None = None,
        val_fraction: float = 0.1,
        val_file: str | None = None,
        skip_bad: bool = False,
        bad: Sequence[BadFile] = (),
    ):
        known = None if vocab is None else Alphabet.read(vocab)
        self.files: list[TextFile] = []
        self.notes: list[tuple[str, str]] = []
        surveys: list[tuple[Counter[str], int]] = []
        train: list[Span] = []
        bad = list(bad)
        for path in map(Path, paths):
            try:
                survey = _survey(file := TextFile(path), known)
                span = Span(file, file.start, file.stop if val_file else file.cut(1 - val_fraction))
                if not _has_labels(span, known):
                    raise ValueError("has fewer than two characters of the vocabulary to train on; lower val_fraction")
                surveys.append(survey)
                self.files.append(file)
                train.append(span)
            except OSError as error:
                bad.append(BadFile(path, error.strerror or one_line(error)))
            except ValueError as error:
                bad.append(BadFile(path, str(error).removeprefix(f"{printable(path)}: ")))
        if bad and not (skip_bad and self.files):
            raise BadFilesError(bad, "no file is left to train on:" if skip_bad else "")
        self.notes += [(printable(one.path), one.reason) for one in bad]
        self.names = display_names([file.path for file in self.files])
        self.tokenizer = known or Alphabet(set().union(*(counts for counts, _ in surveys)))
        self.spans = {
            "train": train,
            "validation": [Span(span.file, span.stop, span.file.stop) for span in train],
        }
        self.validated = self.names
        if val_file is not None:
            file = TextFile(val_file)
            surveys.append(_survey(file, self.tokenizer))
            self.spans["validation"], self.validated = [Span(file, file.start, file.stop)], [printable(file.path.name)]
            self.files.append(file)
        for name, (counts, wrong) in zip([*self.names, *self.validated], surveys, strict=False):
            self._note(name, counts, wrong)
        # bytes, or 0 where there is nothing to predict
        self.sizes = {
            split: [len(span) if _has_labels(span, self.tokenizer) else 0 for span in spans]
            for split, spans in self.spans.items()
        }

    def _note(self, name: str, counts: Counter[str], wrong: int) -> None:
        if wrong:
            self.notes.append((name, f"{wrong:,} bytes that are not UTF-8, left out"))
        unknown = self.tokenizer.unknown(counts)
        if unknown:
            total = sum(counts[character] for character in unknown)
            which = join_names([repr(character) for character in unknown], _MOST_NAMED)
            how = "read as U+FFFD" if "\ufffd" in self.tokenizer.characters else "left out"
            self.notes.append((name, f"{total:,} characters that the vocabulary lacks, {how}: {which}"))

    def get_batch(
        self,
        split: str,
        batch_size: int,
        block_size: int,
        generator: torch.Generator,
        *,
        chunk_windows: int = 1,
        balanced: bool = False,
        file_id: int | None = None,
    ) -> Batch:
        """Random windows.

        Args:
            split: "train" or "validation".
            batch_size: how many.
            block_size: their characters.
            generator: of the draws.
            chunk_windows: how many are from one random chunk of a text, which is as long as so many windows.
            balanced: draw files equally often, rather than by their sizes.
            file_id: the only text to draw from; None for all.

        Returns:
            `{"input": [B, S] int64, "target": [B, S] int64, "file_id": [B] int64}`, where the target of a character is
            the next one, S is block_size or what the longest text has, and the targets after a shorter text's end are
            -100.

        Raises:
            ValueError: no such split, or no window with something to predict was found.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        spans, sizes = self.spans[split], self.sizes[split]
        weights = torch.tensor([bool(size) if balanced else size for size in sizes], dtype=torch.float64)
        rows: list[list[int]] = []
        files: list[int] = []
        empty = 0
        while len(rows) < batch_size:
            if empty == _MOST_EMPTY:
                raise ValueError(
                    f"{_MOST_EMPTY} random windows in a row have fewer than two characters of the vocabulary; it must "
                    "be that of the texts"
                )
            chosen = int(torch.multinomial(weights, 1, generator=generator)) if file_id is None else file_id
            count = min(chunk_windows, batch_size - len(rows))
            ids = self.tokenizer.encode(spans[chosen].chunk(max(block_size + 1, count * block_size), generator))
            if len(ids) < 2:
                empty += 1
                continue
            empty = 0
            places = max(1, len(ids) - block_size)
            for start in torch.randint(places, (count,), generator=generator).tolist():
                rows.append(ids[start : start + block_size + 1])
                files.append(chosen)
        return _collated(rows, files)

    def whole(self, file_id: int, block_size: int, batch_size: int, most: int) -> Iterator[Batch]:
        """The validation text of a file from its start, each character a target once, about `most` at most."""
        rows: list[list[int]] = []
        for number, piece in enumerate(self.spans["validation"][file_id].pieces(block_size + 1)):
            if number * block_size >= most:
                break
            rows.append(self.tokenizer.encode(piece))
            if len(rows) == batch_size:
                yield _collated(rows, [file_id] * len(rows))
                rows = []
        if rows:
            yield _collated(rows, [file_id] * len(rows))


def _survey(file: TextFile, known: Alphabet | None) -> tuple[Counter[str], int]:
    counts, wrong = file.survey()
    unknown = set() if known is None else {*known.unknown(counts)}
    if sum(count for character, count in counts.items() if character not in unknown) < 2:
        raise ValueError(f"{printable(file.path)}: has fewer than two characters of the vocabulary")
    return counts, wrong


def _has_labels(span: Span, known: Alphabet | None) -> bool:
    """Whether a text has two characters of a vocabulary, or of any at all."""
    count = 0
    for text, _ in span.file.parts(span.start, span.stop):
        count += len(text if known is None else known.encode(text))
        if count > 1:
            return True
    return False


def _collated(rows: Sequence[list[int]], files: Sequence[int]) -> Batch:
    """Rows of ids as inputs, targets and file ids, padded on the right, where a causal model sees it too late."""
    width = max(1, max(map(len, rows)) - 1)
    ids = torch.tensor([row + [0] * (width + 1 - len(row)) for row in rows])
    labels = torch.tensor([len(row) - 1 for row in rows])
    targets = ids[:, 1:].masked_fill(torch.arange(width) >= labels[:, None], IGNORE_INDEX)
    return {"input": ids[:, :-1].contiguous(), "target": targets, "file_id": torch.tensor(files)}


def count_labels(batch: Batch) -> int:
    """The characters of a batch that are to be predicted."""
    return int((batch["target"] != IGNORE_INDEX).sum())
