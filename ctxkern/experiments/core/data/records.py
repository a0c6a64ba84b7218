"""Records, such as a line of a jsonl file, as items `{"input", "target"}`."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

PAIRS = (
    ("input", "target"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "answerkey"),
    ("query", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("source", "target"),
)
_TEXTS = ("text", "content")
# kept in the prompt where a record has them: what to do, then what it is about
PREAMBLE = ("system", "system_prompt", "definition", "instruction", "instructions")
_PASSAGES = ("context", "passage", "body")
_CHOICES = ("choices", "options")
ACCEPTED = f"{', '.join('/'.join(pair) for pair in PAIRS)}, messages, or {' or '.join(_TEXTS)} alone"


@dataclass
class Item:
    """One example, and the keys of its record that are not part of it."""

    input: str
    target: str
    unused: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, str]:
        """`{"input", "target"}`.

        Raises:
            ValueError: a NUL character in one of them.
        """
        for name, text in (("input", self.input), ("target", self.target)):
            if "\0" in text:
                raise ValueError(f"the text of its {name} holds a NUL character")
        return {"input": self.input, "target": self.target}


def is_grid(value: object) -> TypeGuard[list[list[int]]]:
    """Whether `value` is a list of rows of equal length of the integers 0 to 9, as ARC has it."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
        and all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    )


def grid_to_text(grid: list[list[int]]) -> str:
    """Rows of digits, one line per row: `[[1, 0], [0, 2]]` is `"10\\n02"`."""
    return "\n".join("".join(map(str, row)) for row in grid)


def text_to_grid(text: str) -> list[list[int]]:
    """The inverse of `grid_to_text`.

    Raises:
        ValueError: a character that is neither a digit nor a line end.
    """
    if not all(character in "0123456789\n" for character in text):
        raise ValueError(f"text is {text[:40]!r}; it must be lines of the digits 0 to 9")
    return [[int(cell) for cell in row] for row in text.split("\n")]


def to_text(value: object) -> str:
    """A string as it is, a grid as digits, a list of one entry as that entry, anything else as JSON."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if is_grid(value):
        return grid_to_text(value)
    if isinstance(value, list) and len(value) == 1:
        return to_text(value[0])
    return json.dumps(value, ensure_ascii=False)


def _choices_to_text(choices: object, answer: object) -> str:
    """One line per choice, labelled as the answer refers to it: by the record's labels, from 0, or from A."""
    if (
        isinstance(choices, list)
        and choices
        and all(isinstance(c, Mapping) and {"label", "text"} <= {*c} for c in choices)
    ):
        labelled = [(choice["label"], choice["text"]) for choice in choices]
    elif isinstance(choices, Mapping) and all(isinstance(choices.get(key), list) for key in ("label", "text")):
        labels, texts = choices["label"], choices["text"]
        if len(labels) != len(texts):
            raise ValueError(f"its choices have {len(labels)} labels and {len(texts)} texts; they must be as many")
        labelled = list(zip(labels, texts, strict=True))
    elif isinstance(choices, Mapping):
        labelled = list(choices.items())
    elif isinstance(choices, list):
        by_number = type(answer) is int or len(choices) > len(string.ascii_uppercase)
        labelled = list(zip(range(len(choices)) if by_number else string.ascii_uppercase, choices, strict=False))
    else:
        return to_text(choices)
    return "\n".join(f"{label}. {to_text(text)}" for label, text in labelled)


def _content_to_text(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return to_text(content)
    parts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", sorted(map(str, part))) if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{place} has a part of the kind {kind!r}; only text can be read")
        parts.append(to_text(text))
    return "".join(parts)


def _message_to_text(message: Mapping, place: str) -> str:
    text = _content_to_text(message.get("content"), place)
    calls = message.get("tool_calls")
    return "\n".join(part for part in (text, to_text(calls) if calls else "") if part)


def _from_messages(fields: Mapping[str, object], preamble: list[str]) -> Item:
    messages = fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError("messages must be a list of two or more objects with role and content")
    *before, last = messages
    if last.get("role") != "assistant":
        raise ValueError(f"messages end with the role {last.get('role')!r}; the last one must be the assistant's")
    answer = _message_to_text(last, f"message {len(messages)}")
    if not answer and not isinstance(last.get("content"), str):
        raise ValueError("messages end with an assistant's message without content")
    lines = [
        f"{message.get('role', 'user')}: {_message_to_text(message, f'message {i}')}"
        for i, message in enumerate(before, 1)
    ]
    known = ("role", "content", "tool_calls")
    extra = {f"messages.{key}" for m in messages for key, value in m.items() if key not in known and value is not None}
    return Item("\n".join([*preamble, *lines]), answer, tuple(sorted(extra)))


def record_to_item(record: object, preamble: Sequence[str] = ()) -> Item:
    """The item of one record: a string, or an object with one of the usual sets of keys (in any case).

    Args:
        record: any JSON value.
        preamble: texts to put before its prompt.

    Raises:
        ValueError: none of the usual keys, or messages without an answer; the message is the reason alone.
    """
    if isinstance(record, str):
        return Item("\n".join(preamble), to_text(record))
    if not isinstance(record, Mapping):
        raise ValueError(f"it is of the type {type(record).__name__}; it must be an object with the keys {ACCEPTED}")
    fields = {str(key).lower(): value for key, value in record.items() if value is not None}
    pair = next((pair for pair in PAIRS if pair[0] in fields and pair[1] in fields), None)
    used = {key for key in PREAMBLE if fields.get(key)}
    before = [*preamble, *(to_text(fields[key]) for key in PREAMBLE if key in used and (not pair or key != pair[0]))]
    if "messages" in fields:
        item = _from_messages(fields, before)
        used.add("messages")
    elif pair:
        prompt_key, target_key = pair
        parts = [to_text(fields[key]) for key in _PASSAGES if fields.get(key)]
        parts.append(to_text(fields[prompt_key]))
        used |= {*pair, *_PASSAGES}
        # Alpaca's input comes after the instruction
        if prompt_key == "instruction" and fields.get("input"):
            parts.append(to_text(fields["input"]))
            used.add("input")
        for key in _CHOICES:
            if fields.get(key):
                parts.append(_choices_to_text(fields[key], fields[target_key]))
                used.add(key)
        item = Item("\n".join([*before, *parts]), to_text(fields[target_key]))
    else:
        text_key = next((key for key in _TEXTS if key in fields), None)
        if text_key is None:
            keys = ", ".join(sorted(f"{key} (null)" if value is None else str(key) for key, value in record.items()))
            raise ValueError(f"it has the keys {keys or 'of an empty object'}; it must have {ACCEPTED}")
        item = Item("\n".join(before), to_text(fields[text_key]))
        used.add(text_key)
    item.unused += tuple(key for key in sorted(fields) if key not in used and fields[key] not in ("", [], {}))
    return item
