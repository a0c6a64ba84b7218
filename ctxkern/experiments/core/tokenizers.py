"""Text to token ids and back: characters or bytes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ctxkern.experiments.core.files import write_atomic, write_text_atomic
from ctxkern.experiments.core.names import printable


class CharTokenizer:
    """One id per character, the vocabulary taken from the training text; characters outside it become `<unk>`.

    Ids 0 to 3 are `<pad>`, `<sep>`, `<eos>`, `<unk>`; the characters follow in code point order. The specials
    cannot be produced by encoding text.

    Args:
        characters: the vocabulary; repeats are ignored.

    Raises:
        TypeError: an entry is not a single character.
    """

    specials = ("<pad>", "<sep>", "<eos>", "<unk>")
    pad_id, sep_id, eos_id, unk_id = range(4)

    def __init__(self, characters: Iterable[str]):
        self.characters = sorted(set(characters))
        for character in self.characters:
            if not isinstance(character, str) or len(character) != 1:
                raise TypeError(f"characters has the entry {character!r}; each must be one character")
        self._ids = {character: len(self.specials) + i for i, character in enumerate(self.characters)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character of `texts`."""
        return cls(set().union(*texts))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, specials included."""
        return len(self.specials) + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of `text`, without specials."""
        ids, unknown = self._ids, self.unk_id
        return [ids.get(character, unknown) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: `<unk>` becomes U+FFFD, the other specials nothing.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        first = len(self.specials)
        out = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"an id is {i}; it must be from 0 to {self.vocab_size - 1}")
            if i >= first:
                out.append(self.characters[i - first])
            elif i == self.unk_id:
                out.append("\ufffd")
        return "".join(out)

    def to_json(self) -> str:
        """What `tokenizer_from_json` reads. The characters are a list: joined, two lone surrogates would become one."""
        return json.dumps({"type": "chars", "characters": self.characters})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters

    __hash__ = None


class Alphabet(CharTokenizer):
    """A `CharTokenizer` without specials: ids 0 to V − 1 are the characters in code point order.

    A character outside it is encoded as U+FFFD where that is one of the characters, and left out otherwise; `unknown`
    says which ones these are.

    Raises:
        ValueError: no characters. TypeError: as `CharTokenizer`.
    """

    specials = ()
    pad_id = sep_id = eos_id = unk_id = None

    def __init__(self, characters: Iterable[str]):
        super().__init__(characters)
        if not self.characters:
            raise ValueError("characters is empty; it must have at least one character")

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Alphabet":
        """The distinct characters of a UTF-8 text, such as `write` leaves; carriage returns are not among them.

        Raises:
            OSError: it cannot be read. ValueError: it is not UTF-8, or has no characters.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{printable(path)}: byte {error.start} is not UTF-8") from error
        if not text.strip("\r"):
            raise ValueError(f"{printable(path)} has no characters; it must have at least one")
        return cls(text.replace("\r", ""))

    def write(self, path: str | os.PathLike) -> None:
        """Write the characters one after another as a UTF-8 text, whole or not at all."""
        text = "".join(self.characters)
        # a byte order mark that is a character follows one that is none
        data = text.encode("utf-8-sig" if text[0] == "\ufeff" else "utf-8")
        write_atomic(path, lambda temporary: temporary.write_bytes(data))

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of `text`."""
        ids = self._ids
        unknown = ids.get("\ufffd")
        found = (ids.get(character, unknown) for character in text)
        return [i for i in found if i is not None]

    def unknown(self, text: Iterable[str]) -> list[str]:
        """The distinct characters of `text` that are not in the vocabulary, in code point order."""
        return sorted(set(text) - self._ids.keys())


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then `<pad>` 256, `<sep>` 257, `<eos>` 258. Nothing is unknown."""

    specials = ("<pad>", "<sep>", "<eos>")
    pad_id, sep_id, eos_id = range(256, 259)
    unk_id = None
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, without specials; lone surrogates keep their three-byte form."""
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: specials become nothing, bytes that are not UTF-8 U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"an id is {outside}; it must be from 0 to {self.vocab_size - 1}")
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def to_json(self) -> str:
        """What `tokenizer_from_json` reads."""
        return json.dumps({"type": "bytes"})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    __hash__ = None


Tokenizer = CharTokenizer | ByteTokenizer
TOKENS = ("chars", "bytes")


def build_tokenizer(tokens: str, texts: Iterable[str]) -> Tokenizer:
    """`"chars"`: a `CharTokenizer` of `texts`; `"bytes"`: a `ByteTokenizer`.

    Raises:
        ValueError: another name.
    """
    if tokens == "chars":
        return CharTokenizer.from_texts(texts)
    if tokens == "bytes":
        return ByteTokenizer()
    raise ValueError(f"tokens is {tokens!r}; it must be one of {', '.join(TOKENS)}")


def tokenizer_from_json(text: str) -> Tokenizer:
    """The inverse of `to_json`.

    Raises:
        ValueError: not a tokenizer's JSON.
    """
    try:
        value = json.loads(text)
        kind = value["type"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "chars":
            return CharTokenizer(value["characters"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"text is not the JSON of a tokenizer ({error!r})") from error
    raise ValueError(f"the tokenizer's type is {kind!r}; it must be one of {', '.join(TOKENS)}")


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write `tokenizer` as JSON, whole or not at all."""
    write_text_atomic(path, tokenizer.to_json() + "\n")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read what `save_tokenizer` wrote."""
    return tokenizer_from_json(Path(path).read_text(encoding="utf-8"))
