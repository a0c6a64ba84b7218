"""Bytes to text: UTF-8, or UTF-16 and UTF-32 with or without a byte order mark."""

import codecs
import re
import unicodedata

# UTF-32 first: its little-endian mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_WIDE = ("UTF-32-LE", "UTF-32-BE", "UTF-16-LE", "UTF-16-BE")
_NOT_TEXT = "it is binary, damaged, or in an encoding other than UTF-8, UTF-16 and UTF-32"
# ASCII and the punctuation of Chinese and Japanese: read in the wrong byte order, a text has next to none of these
_COMMON = re.compile("[\t\n\r -~\u3000-\u303f\uff00-\uffef]")
_LEAST_COMMON = 0.01
# ASCII in UTF-16 is half NULs; less than this in valid UTF-8 are stray ones
_LEAST_NULS = 0.25
# control characters that texts do not use; Cyrillic or Greek in UTF-16 is nearly half of these
_CONTROLS = bytes({*range(32)} - {*b"\0\t\n\v\f\r\x1b"})
_MOST_CONTROLS = 0.1


def _decode_strictly(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"not {encoding} text ({where}); convert it, or leave it out") from error


def _is_plausible(text: str) -> bool:
    """Whether all characters are assigned ones, and none a control character that texts do not use."""
    return all(
        character in "\t\n\v\f\r\x1b" or unicodedata.category(character) not in ("Cc", "Cn", "Co", "Cs")
        for character in set(text)
    )


def _count_controls(data: bytes) -> int:
    return len(data) - len(data.translate(None, _CONTROLS))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guess_wide(data: bytes) -> str | None:
    """The encoding of `_WIDE` that `data`, which has no byte order mark, is most likely in."""
    stray_nuls = data.count(0) < _LEAST_NULS * len(data) and _count_controls(data) == 0
    if stray_nuls and _is_utf8(data):
        return None
    best, best_score = None, 0
    for encoding in _WIDE:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        score = len(_COMMON.findall(text))
        if score > max(best_score, _LEAST_COMMON * len(text)) and _is_plausible(text):
            best, best_score = encoding, score
    return best


def decode_text(data: bytes) -> tuple[str, str]:
    """The text of `data`, without a byte order mark and with `\\n` line ends, and the name of its encoding.

    Raises:
        ValueError: not text in one of these encodings, NUL characters, or more than a tenth control characters; the
            message is the reason alone.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            text = _decode_strictly(data[len(mark) :], encoding)
            break
    else:
        too_many = _count_controls(data) > _MOST_CONTROLS * len(data)
        encoding = (_guess_wide(data) if too_many or b"\0" in data else None) or "UTF-8"
        text = _decode_strictly(data, encoding)
        if encoding == "UTF-8" and too_many and "\0" not in text:
            raise ValueError(f"holds many control characters: {_NOT_TEXT}")
    if "\0" in text:
        raise ValueError(f"holds a NUL character (at position {text.index(chr(0))}): {_NOT_TEXT}")
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding
