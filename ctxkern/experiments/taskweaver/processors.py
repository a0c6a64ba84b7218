"""Records of datasets as prompts and completions in tokens: the interface, and the processors that are built in."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from ctxkern.experiments.core.data.records import record_to_item
from ctxkern.experiments.core.data.windows import IGNORE_INDEX

Columns = dict[str, list]
MAX_LENGTH = 512


class EmptyTextError(ValueError):
    """An example has no completion, or no prompt."""


class DatasetProcessor:
    """Makes examples of records; a subclass defines `process`.

    Args:
        tokenizer: of transformers, with an end-of-text token.
        max_length: the most tokens of an example. Longer prompts are cut on the left to three quarters of it, whatever
            the completion is: the cut must not tell the length. A completion that does not fit loses its end.

    Raises:
        ValueError: a tokenizer without eos_token, or a max_length below 4.
    """

    def __init__(self, tokenizer: Any, max_length: int = MAX_LENGTH):
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__} without eos_token; it must have one")
        if max_length < 4:
            raise ValueError(f"max_length is {max_length}; it must be at least 4")
        self.tokenizer, self.max_length = tokenizer, max_length

    def process(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """The columns of `_prepare_examples` for a list of records.

        Raises:
            KeyError, TypeError, ValueError: a record of another form.
        """
        raise NotImplementedError(f"{type(self).__name__} must define process(examples)")

    def answer(self, completion: str) -> str:
        """The part of a completion that exact match compares: all but the white space at both ends."""
        return completion.strip()

    def encode_prompt(self, prompt: str) -> tuple[list[int], bool]:
        """The ids of a prompt, with what the tokenizer puts before a text, and whether it was cut."""
        ids = self.tokenizer.encode(prompt)
        # some tokenizers end every text
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        most = self.max_length * 3 // 4
        return ids[-most:], len(ids) > most

    def _prepare_examples(self, prompts: Sequence[str], completions: Sequence[str]) -> Columns:
        """Columns of as many rows as there are prompts.

        Returns:
            "input_ids", "attention_mask" and "labels": lists of ids of prompt, completion and end of text; labels are
            -100 on the prompt. "prompt_lengths": tokens of the prompt. "prompt_cut", "completion_cut": whether
            something was left out; a completion that was cut has no end of text.

        Raises:
            EmptyTextError: a prompt or completion without text.
        """
        names = ("input_ids", "attention_mask", "labels", "prompt_lengths", "prompt_cut", "completion_cut")
        columns: Columns = {name: [] for name in names}
        for prompt, completion in zip(prompts, completions, strict=True):
            if not completion.strip():
                raise EmptyTextError("its completion is empty; it must have some text")
            head, prompt_cut = self.encode_prompt(prompt)
            if not head:
                raise EmptyTextError("its prompt is empty; it must have some text")
            tail = [*self.tokenizer.encode(completion, add_special_tokens=False), self.tokenizer.eos_token_id]
            room = self.max_length - len(head)
            ids = head + tail[:room]
            labels = [IGNORE_INDEX] * len(head) + tail[:room]
            row = (ids, [1] * len(ids), labels, len(head), prompt_cut, len(tail) > room)
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)
        return columns


def _fields(record: Any, *names: str) -> dict[str, Any]:
    """The fields of a record under their names in lower case.

    Raises:
        ValueError: one of `names` is missing.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"it is of the type {type(record).__name__}; it must be an object with {', '.join(names)}")
    found = {str(key).lower(): value for key, value in record.items()}
    for name in names:
        if found.get(name) is None:
            raise ValueError(f"it has the keys {', '.join(map(str, record))}; it must have {', '.join(names)}")
    return found


class GSM8KProcessor(DatasetProcessor):
    """Records with question and answer, whose end after #### is the number."""

    def answer(self, completion: str) -> str:
        """The number after the last ####, or all of a completion without one."""
        return completion.rpartition("####")[2].strip()

    def process(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        found = [_fields(example, "question", "answer") for example in examples]
        prompts = [f"Question: {fields['question']}\nAnswer:" for fields in found]
        return self._prepare_examples(prompts, [_after_space(fields["answer"]) for fields in found])


class SVAMPProcessor(DatasetProcessor):
    """Records with Body, Question and Answer, a number."""

    def process(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        prompts, completions = [], []
        for example in examples:
            fields = _fields(example, "body", "question", "answer")
            body, answer = str(fields["body"]).strip(), fields["answer"]
            if isinstance(answer, str):
                with contextlib.suppress(ValueError):
                    answer = float(answer)
            if isinstance(answer, float) and answer.is_integer():
                answer = int(answer)
            body += "" if body.endswith((".", "?", "!", ",")) else "."
            prompts.append(f"Question: {body} {fields['question']}\nAnswer:")
            completions.append(_after_space(answer))
        return self._prepare_examples(prompts, completions)


class BBHProcessor(DatasetProcessor):
    """Records with input and target, as the tasks of BIG-Bench Hard."""

    def process(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        found = [_fields(example, "input", "target") for example in examples]
        prompts = [f"{str(fields['input']).rstrip()}\nAnswer:" for fields in found]
        return self._prepare_examples(prompts, [_after_space(fields["target"]) for fields in found])


class PairsProcessor(DatasetProcessor):
    """Records of every form that `ctxkern train` reads and that have a prompt; a line end parts it from its answer."""

    def process(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        items = [record_to_item(example) for example in examples]
        for item in items:
            if not item.input.strip():
                raise EmptyTextError("its prompt is empty; it must have some text")
        return self._prepare_examples([f"{item.input}\n" for item in items], [item.target for item in items])


def _after_space(answer: Any) -> str:
    text = str(answer).strip()
    return f" {text}" if text else ""


_BUILT_IN: dict[str, Any] = {
    "gsm8k": GSM8KProcessor,
    "svamp": SVAMPProcessor,
    "bbh": BBHProcessor,
    "pairs": PairsProcessor,
}


def register_processor(name: str, processor: Any) -> None:
    """Let every dataset configuration name a processor.

    Args:
        name: in place of another of this name, if there is one.
        processor: a `DatasetProcessor`, or a function of (tokenizer, max_length) that makes one, such as its class.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(processor, DatasetProcessor) and not callable(processor):
        kind = type(processor).__name__
        raise TypeError(f"processor is a {kind}; it must be a DatasetProcessor or a function that makes one")
    _BUILT_IN[name] = processor


def registered() -> dict[str, Any]:
    """The processors by name, as `register_processor` takes them."""
    return dict(_BUILT_IN)
