"""What weights are worth on examples: those of a prompt, of another task's, of a blank one, of adapters, and none."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.taskweaver.data import Collator, TaskDataset
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver
from ctxkern.experiments.taskweaver.measure import PromptEmbeddings, Score, TrainedModel, TrainedWeaver, score

# whose weights an example gets
ALIGNED, SHUFFLED, BLANK, BASE = ARMS = ("aligned", "shuffled", "blank", "base")


def shuffled(dataset: TaskDataset, chosen: Sequence[int], seed: int) -> dict[int, int]:
    """For each example the one of `chosen` whose prompt it gets: of another dataset, or of its own if it is alone."""
    rng, found = generator(seed, "shuffled"), {}
    for i in chosen:
        others = [j for j in chosen if dataset.file_ids[j] != dataset.file_ids[i]]
        others = others or [j for j in chosen if j != i] or [i]
        found[i] = others[int(torch.randint(len(others), (1,), generator=rng))]
    return found


def blank_prompt(tokenizer: Any) -> Tensor:
    """The ids [1] of a prompt without text: the token that begins a text, or if there is none the one that ends it."""
    first = tokenizer.bos_token_id
    return torch.tensor([tokenizer.eos_token_id if first is None else first])


@dataclass(frozen=True)
class Arm:
    """A way to run the language model on examples.

    Attributes:
        name: for tables.
        model: what runs.
        source: of the indices of examples, where their weights come from; None: the language model as it is.
        shots: for an index, the ids [s] of what is put before its prompt; None: nothing.
    """

    name: str
    model: TrainedModel
    source: Callable[[list[int]], Tensor | None] = lambda indices: None
    shots: Callable[[int], Tensor] | None = None


def spread(dataset: TaskDataset, indices: Sequence[int], most: int) -> list[int]:
    """Of each dataset at most so many of `indices`, evenly spread."""
    chosen: list[int] = []
    for number in range(len(dataset.names)):
        own = [i for i in indices if dataset.file_ids[i] == number]
        count = min(most, len(own))
        chosen += [own[i * len(own) // count] for i in range(count)]
    return chosen


def prompt_arms(
    weaver: TaskWeaver, tokenizer: Any, dataset: TaskDataset, chosen: Sequence[int], seed: int
) -> list[Arm]:
    """The arms `ARMS`: weights of each prompt, of another dataset's prompt, of one without text, and none."""
    other, blank = shuffled(dataset, chosen, seed), blank_prompt(tokenizer)
    embeddings = PromptEmbeddings(weaver, len(chosen) + 1)
    prompts: dict[str, Callable[[int], Tensor]] = {
        ALIGNED: dataset.prompt,
        SHUFFLED: lambda i: dataset.prompt(other[i]),
        BLANK: lambda i: blank,
    }
    model = TrainedWeaver(weaver).eval()

    def arm(name: str, prompt: Callable[[int], Tensor]) -> Arm:
        return Arm(name, model, lambda indices: embeddings([prompt(i) for i in indices]))

    return [*(arm(name, prompt) for name, prompt in prompts.items()), Arm(BASE, model)]


def few_shot_arm(
    model: TrainedModel, tokenizer: Any, dataset: TaskDataset, known: Sequence[int], shots: int, seed: int
) -> Arm:
    """The language model alone, each prompt after so many answered ones of its dataset.

    Args:
        model: whose language model it is.
        tokenizer: of transformers.
        dataset: the examples.
        known: indices of those that may be shown. An example is never shown its own answer.
        shots: how many are shown, fewer where a dataset has fewer.
        seed: of which.
    """
    gap = torch.tensor(tokenizer.encode("\n\n", add_special_tokens=False), dtype=torch.int32)
    of_dataset: dict[int, list[int]] = {}
    for i in known:
        of_dataset.setdefault(dataset.file_ids[i], []).append(i)

    def before(index: int) -> Tensor:
        others = [i for i in of_dataset.get(dataset.file_ids[index], ()) if i != index]
        order = torch.randperm(len(others), generator=generator(seed, "shots", index)).tolist()[:shots]
        rows = [dataset[others[place]]["input_ids"] for place in order]
        # the end of text would part them from what follows
        rows = [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in rows]
        return torch.cat([part.to(torch.int32) for row in rows for part in (row, gap)] or [gap[:0]])

    return Arm(f"{shots}-shot", model, shots=before)


def evaluate(
    arms: Sequence[Arm],
    tokenizer: Any,
    dataset: TaskDataset,
    chosen: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    known: Sequence[int] | None = None,
    report: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row for each dataset and arm.

    Args:
        arms: what is measured.
        tokenizer: of transformers.
        dataset: any examples, those of datasets that a model was not trained on too.
        chosen: indices of examples.
        batch_size: examples at a time.
        max_new_tokens: the longest answer, of which exact match is counted; None: as long as the completion. 0: no
            answers are generated, and a match is a completion whose every token is the likeliest one after those before
            it: what greedy decoding finds, but not where it says the same in other tokens.
        known: indices of the examples whose most frequent answer is compared with; None: all of the dataset.
        report: called with a number of examples that are done in an arm.

    Returns:
        "dataset", "weights" (the arm), "examples", "loss" (nats per token), "token_accuracy", "exact_match", and
        "majority", the share of the examples that the most frequent answer of the dataset is right for.
    """
    rows = []
    for number, name in enumerate(dataset.names):
        own = [i for i in chosen if dataset.file_ids[i] == number]
        everything = range(len(dataset)) if known is None else known
        majority = _majority(dataset, number, own, everything, _compared(dataset, tokenizer, number, max_new_tokens))
        for arm in arms:
            total, exact = Score(), 0
            for start in range(0, len(own), batch_size):
                part = own[start : start + batch_size]
                items = [_after(arm, dataset, i) for i in part]
                source = arm.source(part)
                source = None if source is None else source.to(arm.model.lm.device)
                batch = _collated(arm.model.lm, tokenizer, items, "right")
                found = score(arm.model, batch if source is None else {**batch, "source": source})
                total += found
                if max_new_tokens == 0:
                    exact += found.exact
                else:
                    answer = dataset.answers[number]
                    exact += _exact(arm.model, tokenizer, items, source, max_new_tokens, answer)
                report(len(part))
            if own:
                rows.append(
                    {
                        "dataset": name,
                        "weights": arm.name,
                        "examples": len(own),
                        "loss": total.loss / total.labels,
                        "token_accuracy": total.right / total.labels,
                        "exact_match": exact / len(own),
                        "majority": majority,
                    }
                )
    return rows


def _compared(
    dataset: TaskDataset, tokenizer: Any, number: int, max_new_tokens: int | None
) -> Callable[[Tensor], Hashable]:
    """What of a completion exact match looks at."""
    if max_new_tokens == 0:
        return lambda ids: tuple(ids.tolist())
    return lambda ids: dataset.answers[number](_text(tokenizer, ids))


def _majority(
    dataset: TaskDataset,
    number: int,
    chosen: Sequence[int],
    known: Sequence[int],
    taken: Callable[[Tensor], Hashable],
) -> float:
    """The share of `chosen` whose answer, what is taken of a completion, is the most frequent one among `known`."""

    def completion(i: int) -> Hashable:
        item = dataset[i]
        return taken(item["input_ids"][item["prompt_length"] :])

    counts = Counter(completion(i) for i in known if dataset.file_ids[i] == number)
    if not counts or not chosen:
        return 0.0
    ((answer, _),) = counts.most_common(1)
    return sum(completion(i) == answer for i in chosen) / len(chosen)


def _after(arm: Arm, dataset: TaskDataset, index: int) -> dict[str, Any]:
    """An example, after what is shown before it."""
    item = dataset[index]
    if arm.shots is None:
        return item
    before = arm.shots(index)
    unlabelled = torch.full_like(before, IGNORE_INDEX)
    return item | {
        "input_ids": torch.cat([before, item["input_ids"]]),
        "labels": torch.cat([unlabelled, item["labels"]]),
        "prompt_length": len(before) + item["prompt_length"],
    }


def _collated(lm: Any, tokenizer: Any, items: Sequence[dict[str, Any]], side: str) -> dict[str, Tensor]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {name: t.to(lm.device) for name, t in Collator(pad, side)(items).items()}


@torch.no_grad()
def _exact(
    model: TrainedModel,
    tokenizer: Any,
    items: Sequence[dict[str, Any]],
    source: Tensor | None,
    max_new_tokens: int | None,
    answer: Callable[[str], str],
) -> int:
    """How many greedy answers are the completion, by the part that `answer` takes of a text."""
    batch = _collated(model.lm, tokenizer, items, "left")
    wanted = [item["input_ids"][item["prompt_length"] :] for item in items]
    with model.using(source):
        answers = model.lm.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens or max(map(len, wanted)),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[:, batch["input_ids"].shape[1] :]
    pairs = zip(answers, wanted, strict=True)
    return sum(answer(_text(tokenizer, found)) == answer(_text(tokenizer, want)) for found, want in pairs)


def _text(tokenizer: Any, ids: Tensor) -> str:
    row = ids.tolist()
    end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
    return tokenizer.decode(row[:end], skip_special_tokens=True).strip()
