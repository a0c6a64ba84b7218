"""Random chunks of texts of any size, read through memory maps: nothing is held but what is asked for."""

import bisect
import codecs
import io
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ctxkern.experiments.core.names import printable

_SCANNED_BYTES = 2**20
# of a character in UTF-8
_MOST_BYTES = 4


class TextFile:
    """A text in UTF-8, memory-mapped.

    A byte order mark at its start, and bytes that are not UTF-8, are left out; line ends become `\\n`.

    Args:
        path: the file.

    Attributes:
        start, stop: the bytes [start, stop) of the text.

    Raises:
        OSError: it cannot be opened. ValueError: it is empty.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self.path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{printable(path)}: it is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.start = len(codecs.BOM_UTF8) if self._map[:3] == codecs.BOM_UTF8 else 0
        self.stop = len(self._map)

    def text(self, start: int, stop: int) -> str:
        """The characters of the bytes [start, stop); of one that is cut there is nothing."""
        return self._map[start:stop].decode("utf-8", "ignore").replace("\r\n", "\n").replace("\r", "\n")

    def cut(self, share: float) -> int:
        """The byte at which the first `share` of the text ends, between two characters."""
        byte = self.start + int(share * (self.stop - self.start))
        while byte < self.stop and self._map[byte] & 0xC0 == 0x80:
            byte += 1
        return byte

    def parts(self, start: int, stop: int) -> Iterator[tuple[str, int]]:
        """The text of the bytes [start, stop) in parts, each with the number of its bytes that are not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        line_ends = io.IncrementalNewlineDecoder(None, translate=True)
        for first in range(start, stop, _SCANNED_BYTES):
            last = min(first + _SCANNED_BYTES, stop)
            before = len(decoder.getstate()[0])
            text = decoder.decode(self._map[first:last], last == stop)
            taken = before + last - first - len(decoder.getstate()[0])
            yield line_ends.decode(text, last == stop), taken - len(text.encode())

    def survey(self) -> tuple[Counter[str], int]:
        """How often each character is there, and how many bytes are not UTF-8.

        Raises:
            ValueError: no characters, or NUL characters, as texts in other encodings have.
        """
        counts: Counter[str] = Counter()
        bad = 0
        for text, wrong in self.parts(self.start, self.stop):
            counts.update(text)
            bad += wrong
        if counts["\0"]:
            raise ValueError(f"{printable(self.path)}: holds NUL characters; it must be a text in UTF-8")
        if not counts.total():
            raise ValueError(f"{printable(self.path)}: has no characters; it must be a text in UTF-8")
        return +counts, bad


class Span:
    """The bytes [start, stop) of a text, as a source of random chunks.

    Args:
        file: the text.
        start, stop: the bytes, each between two characters.
    """

    def __init__(self, file: TextFile, start: int, stop: int):
        self.file, self.start, self.stop = file, start, stop
        self._starts: dict[int, int] = {}

    def __len__(self) -> int:
        """Its bytes."""
        return self.stop - self.start

    def _last_start(self, characters: int) -> int:
        """The last byte that so many characters follow, or the first byte."""
        if characters not in self._starts:
            size = min(len(self), characters)
            while size < len(self) and len(self.file.text(self.stop - size, self.stop)) < characters:
                size = min(len(self), 2 * size)
            # the more bytes, the more characters
            back = bisect.bisect_left(
                range(size), characters, key=lambda n: len(self.file.text(self.stop - n, self.stop))
            )
            self._starts[characters] = self.stop - back
        return self._starts[characters]

    def read(self, byte: int, characters: int) -> str:
        """The first so many characters from a byte on, fewer where the span ends before."""
        size = characters + _MOST_BYTES
        while True:
            stop = min(byte + size, self.stop)
            text = self.file.text(byte, stop)
            # the last one may be half a line end
            if len(text) > characters or stop == self.stop:
                return text[:characters]
            size *= 2

    def chunk(self, characters: int, generator: torch.Generator) -> str:
        """So many characters from a random place; the whole of a span that has fewer."""
        places = self._last_start(characters) - self.start + 1
        return self.read(self.start + int(torch.randint(places, (), generator=generator)), characters)

    def pieces(self, characters: int) -> Iterator[str]:
        """The whole span in pieces of so many characters and a shorter one, where the last character of each is the
        first of the next: with a label for each character but the first, none twice."""
        text = ""
        for more, _ in self.file.parts(self.start, self.stop):
            text += more
            place = 0
            while len(text) - place > characters:
                yield text[place : place + characters]
                place += characters - 1
            text = text[place:]
        if len(text) > 1:
            yield text
