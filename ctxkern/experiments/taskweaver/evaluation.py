"""What the weights of a TaskWeaver are worth: those of the prompt, of another task's, of a blank one, and none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ctxkern
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.taskweaver.data import Collator, TaskDataset
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver
from ctxkern.experiments.taskweaver.measure import PromptEmbeddings, Score, TrainedWeaver, score

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


def evaluate(
    weaver: TaskWeaver,
    tokenizer: Any,
    dataset: TaskDataset,
    *,
    most: int,
    batch_size: int,
    max_new_tokens: int | None,
    seed: int = 0,
    report: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row for each dataset and arm of `ARMS`.

    Args:
        weaver: in evaluation mode.
        tokenizer: of transformers.
        dataset: any examples, those of datasets that it was not trained on too.
        most: how many examples of each dataset, evenly spread.
        batch_size: examples at a time.
        max_new_tokens: the longest answer, of which exact match is counted; None: as long as the completion, 0: no
            answers are generated.
        seed: of the shuffle.
        report: called with a number of examples that are done in an arm.

    Returns:
        "dataset", "weights" (the arm), "examples", "loss" (nats per token), "token_accuracy", "exact_match".
    """
    chosen: list[int] = []
    for number in range(len(dataset.names)):
        own = [i for i, file_id in enumerate(dataset.file_ids) if file_id == number]
        count = min(most, len(own))
        chosen += [own[i * len(own) // count] for i in range(count)]
    other = shuffled(dataset, chosen, seed)
    blank, embeddings = blank_prompt(tokenizer), PromptEmbeddings(weaver, len(chosen) + 1)
    prompts: dict[str, Callable[[int], Tensor]] = {
        ALIGNED: dataset.prompt,
        SHUFFLED: lambda i: dataset.prompt(other[i]),
        BLANK: lambda i: blank,
    }
    model, rows = TrainedWeaver(weaver).eval(), []
    for number, name in enumerate(dataset.names):
        own = [i for i in chosen if dataset.file_ids[i] == number]
        for arm in ARMS:
            total, exact = Score(), 0
            for start in range(0, len(own), batch_size):
                part = own[start : start + batch_size]
                found = embeddings([prompts[arm](i) for i in part]).to(weaver.lm.device) if arm in prompts else None
                total += _score(model, tokenizer, dataset, part, found)
                if max_new_tokens != 0:
                    exact += _exact(weaver, tokenizer, dataset, part, found, max_new_tokens)
                report(len(part))
            rows.append(
                {
                    "dataset": name,
                    "weights": arm,
                    "examples": len(own),
                    "loss": total.loss / total.labels,
                    "token_accuracy": total.right / total.labels,
                    "exact_match": exact / len(own) if max_new_tokens != 0 else float("nan"),
                }
            )
    return rows


def _collated(
    weaver: TaskWeaver, tokenizer: Any, dataset: TaskDataset, part: Sequence[int], side: str
) -> dict[str, Tensor]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = Collator(pad, side)([dataset[i] for i in part])
    return {name: t.to(weaver.lm.device) for name, t in batch.items()}


def _score(
    model: TrainedWeaver, tokenizer: Any, dataset: TaskDataset, part: Sequence[int], found: Tensor | None
) -> Score:
    batch = _collated(model.weaver, tokenizer, dataset, part, "right")
    return score(model, batch if found is None else {**batch, "embeddings": found})


@torch.no_grad()
def _exact(
    weaver: TaskWeaver,
    tokenizer: Any,
    dataset: TaskDataset,
    part: Sequence[int],
    found: Tensor | None,
    max_new_tokens: int | None,
) -> int:
    """How many greedy answers are the completion, white space at both ends aside."""
    batch = _collated(weaver, tokenizer, dataset, part, "left")
    wanted = [dataset[i]["input_ids"][dataset[i]["prompt_length"] :] for i in part]
    with ctxkern.use(weaver.lm, lora={} if found is None else weaver.weights(found)):
        answers = weaver.lm.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens or max(map(len, wanted)),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[:, batch["input_ids"].shape[1] :]
    return sum(_text(tokenizer, answer) == _text(tokenizer, want) for answer, want in zip(answers, wanted, strict=True))


def _text(tokenizer: Any, ids: Tensor) -> str:
    row = ids.tolist()
    end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
    return tokenizer.decode(row[:end], skip_special_tokens=True).strip()
