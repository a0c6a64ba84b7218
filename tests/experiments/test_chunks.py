"""Texts through memory maps: any size, any bytes."""

import pytest
import torch
from helpers.runs import write
from hypothesis import given
from hypothesis import strategies as st

from ctxkern.experiments.core.data import chunks
from ctxkern.experiments.core.data.chunks import Span, TextFile
from ctxkern.experiments.core.data.reading import BadFilesError
from ctxkern.experiments.core.tokenizers import Alphabet
from ctxkern.experiments.gpt.data import CharData, count_labels


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(file):
    return Span(file, file.start, file.stop)


def drawn(span, characters, count=400):
    generator = rng()
    return [span.chunk(characters, generator) for _ in range(count)]


@pytest.mark.parametrize("text", ["abcdefghij", "añb→c😀d\nef", "😀😀😀😀😀"])
@pytest.mark.parametrize("characters", [1, 3, 5])
def test_chunks_are_all_the_pieces_of_a_text(tmp_path, text, characters):
    span = whole(TextFile(write(tmp_path, "t", text)))
    pieces = {text[i : i + characters] for i in range(len(text) - characters + 1)}
    assert set(drawn(span, characters)) == pieces


def test_places_are_equally_likely(tmp_path):
    counts = dict.fromkeys("abcdefgh", 0)
    for piece in drawn(whole(TextFile(write(tmp_path, "t", "abcdefgh"))), 1, 4000):
        counts[piece] += 1
    # 500 each: about four standard deviations
    assert all(abs(count - 500) < 85 for count in counts.values()), counts


def test_a_text_that_is_shorter_than_a_chunk_is_given_whole(tmp_path):
    span = whole(TextFile(write(tmp_path, "t", "aé\r\nb")))
    assert set(drawn(span, 100, 20)) == {"aé\nb"}


def test_line_ends_and_bytes_that_are_not_utf8(tmp_path):
    file = TextFile(write(tmp_path, "t", b"\xef\xbb\xbfa\r\nb\rc\xff\xfed\n\xe2\x82"))
    assert file.text(file.start, file.stop) == "a\nb\ncd\n"
    counts, wrong = file.survey()
    assert (dict(counts), wrong) == ({"a": 1, "\n": 3, "b": 1, "c": 1, "d": 1}, 4)
    assert set("".join(drawn(whole(file), 3))) == set("abcd\n")
    # a line end of two bytes is one character, from whichever byte on
    pairs = Span(TextFile(write(tmp_path, "u", b"\r\n" * 9)), 0, 18)
    assert set(drawn(pairs, 4)) == {"\n" * 4}


@given(st.text(st.sampled_from("a\r\né😀\ufeff"), min_size=1, max_size=40), st.integers(1, 7), st.integers(2, 6))
def test_parts_and_pieces_are_the_text(tmp_path_factory, text, size, characters):
    file = TextFile(write(tmp_path_factory.mktemp("t"), "t", text))
    expected = text.encode()[file.start :].decode().replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_SCANNED_BYTES", size)
        assert "".join(part for part, _ in file.parts(file.start, file.stop)) == expected
        pieces = list(whole(file).pieces(characters))
    assert all(len(piece) == characters for piece in pieces[:-1])
    assert all(a[-1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    joined = "".join(piece[:-1] for piece in pieces) + (pieces[-1][-1] if pieces else "")
    assert joined == (expected if len(expected) > 1 else "")


def test_a_text_is_cut_between_characters(tmp_path):
    file = TextFile(write(tmp_path, "t", "aé" * 10))
    cuts = [file.cut(share / 30) for share in range(31)]
    assert all(file.text(0, cut) + file.text(cut, file.stop) == "aé" * 10 for cut in cuts)
    assert (cuts[0], cuts[15], cuts[30]) == (0, 15, 30)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "t: it is empty"),
        ("abc".encode("utf-16-le"), "t: holds NUL characters; it must be a text in UTF-8"),
        (b"\xff\xfe\xff", "t: has no characters; it must be a text in UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        TextFile(write(tmp_path, "t", value)).survey()


def test_batches_have_the_next_character_as_target(tmp_path):
    text = "".join(chr(65 + i % 50) for i in range(997))
    data = CharData([write(tmp_path, "t", text)], val_fraction=0.2)
    for split, part in (("train", text[:797]), ("validation", text[797:])):
        batch = data.get_batch(split, 64, 9, rng())
        assert batch["input"].shape == batch["target"].shape == (64, 9)
        assert torch.equal(batch["input"][:, 1:], batch["target"][:, :-1])
        for row, target in zip(batch["input"].tolist(), batch["target"].tolist(), strict=True):
            assert data.tokenizer.decode([*row, target[-1]]) in part
    assert torch.equal(*(data.get_batch("train", 8, 9, rng(1))["input"] for _ in range(2)))
    with pytest.raises(ValueError, match="split is 'test'; it must be one of train, validation"):
        data.get_batch("test", 8, 9, rng())


def test_windows_of_one_chunk_are_near_to_one_another(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    data = CharData([write(tmp_path, "t", text)], val_fraction=0)
    batch = data.get_batch("train", 32, 8, rng(), chunk_windows=32)
    starts = batch["input"][:, 0]
    assert starts.max() - starts.min() <= 32 * 8 - 8
    assert len(set(starts.tolist())) > 16
    apart = data.get_batch("train", 32, 8, rng())["input"][:, 0]
    assert apart.max() - apart.min() > 10_000
    one = data.get_batch("train", 5, 8, rng(), chunk_windows=2)["input"]
    assert one.shape == (5, 8)


def test_files_are_drawn_by_their_sizes_or_equally(tmp_path):
    paths = [write(tmp_path, "a", "a" * 900), write(tmp_path, "b", "b" * 100)]
    data = CharData(paths, val_fraction=0)
    shares = [
        data.get_batch("train", 1000, 4, rng(), balanced=balanced)["file_id"].double().mean().item()
        for balanced in (False, True)
    ]
    # about four standard deviations
    assert shares == [pytest.approx(0.1, abs=0.04), pytest.approx(0.5, abs=0.065)]
    assert data.get_batch("train", 9, 4, rng(), file_id=1)["file_id"].tolist() == [1] * 9


def test_targets_after_a_short_text_are_not_counted(tmp_path):
    data = CharData([write(tmp_path, "a", "abc" * 30), write(tmp_path, "b", "ab")], val_fraction=0)
    batch = data.get_batch("train", 40, 6, rng(), balanced=True)
    short = batch["file_id"] == 1
    assert (batch["target"][short] == torch.tensor([1, *[-100] * 5])).all()
    assert count_labels(batch) == int(short.sum()) + 6 * int((~short).sum())
    assert data.get_batch("train", 4, 6, rng(), file_id=1)["input"].shape == (4, 1)


def test_the_whole_of_a_text_has_each_target_once(tmp_path):
    text = "the quick brown fox jumps over the lazy dog"
    data = CharData([write(tmp_path, "a", text)], val_fraction=0.5)
    span = data.spans["validation"][0]
    part = span.read(span.start, len(text))
    batches = list(data.whole(0, 4, 3, 99))
    targets = [i for batch in batches for i in batch["target"].flatten().tolist() if i != -100]
    assert data.tokenizer.decode(targets) == part[1:]
    assert len(list(data.whole(0, 4, 3, 1))) == 1
    assert sum(count_labels(batch) for batch in data.whole(0, 4, 3, 9)) == 12


def test_a_vocabulary_of_another_text_and_what_it_lacks(tmp_path):
    vocab = write(tmp_path, "vocab.txt", "abc\r\n")
    texts = [write(tmp_path, "a.txt", "abéca\r\nbéc" * 3), write(tmp_path, "b.txt", b"ab\xffab" * 5)]
    data = CharData(texts, vocab=vocab)
    assert data.tokenizer.characters == ["\n", "a", "b", "c"]
    assert data.notes == [
        ("a.txt", "6 characters that the vocabulary lacks, left out: 'é'"),
        ("b.txt", "5 bytes that are not UTF-8, left out"),
    ]
    assert data.tokenizer.decode(data.tokenizer.encode("xaéb")) == "ab"
    write(tmp_path, "vocab.txt", "abc\ufffd")
    data = CharData(texts, vocab=vocab)
    assert data.tokenizer.encode("xa") == [3, 0]
    assert ("a.txt", "9 characters that the vocabulary lacks, read as U+FFFD: '\\n', 'é'") in data.notes


@pytest.mark.parametrize("chunk_windows", [1, 4])
def test_every_window_has_something_to_predict(tmp_path, chunk_windows):
    vocab, text = write(tmp_path, "vocab.txt", "ab"), write(tmp_path, "a.txt", "ж" * 400 + "ab" * 30 + "ж" * 400)
    data = CharData([text], vocab=vocab)
    assert data.sizes["validation"] == [0]
    generator = rng()
    for _ in range(20):
        batch = data.get_batch("train", 4, 6, generator, chunk_windows=chunk_windows)
        assert (batch["target"] != -100).any(1).all()
    # two that no window has both of
    lonely = CharData([write(tmp_path, "b.txt", "a" + "ж" * 99 + "b" + "ж" * 99)], vocab=vocab)
    with pytest.raises(ValueError, match="1000 random windows in a row have fewer than two characters"):
        lonely.get_batch("train", 4, 6, rng())


def test_texts_to_validate_on(tmp_path):
    own, other = write(tmp_path, "a.txt", "abab" * 9), write(tmp_path, "v.txt", "bbbb?")
    data = CharData([own], val_file=other)
    assert (data.names, data.validated, data.tokenizer.characters) == (["a.txt"], ["v.txt"], ["a", "b"])
    assert data.notes == [("v.txt", "1 characters that the vocabulary lacks, left out: '?'")]
    assert set(data.get_batch("validation", 8, 3, rng())["input"].flatten().tolist()) == {1}
    assert len(data.spans["train"][0]) == 36


def test_bad_texts_are_named_all_at_once(tmp_path):
    good, empty, nul = (write(tmp_path, name, text) for name, text in (("g", "good"), ("e", ""), ("n", "a\0b")))
    with pytest.raises(BadFilesError, match="it is empty\n.*NUL characters") as raised:
        CharData([good, empty, nul, tmp_path / "absent"])
    assert len(raised.value.files) == 3
    data = CharData([good, empty], skip_bad=True)
    assert (data.names, data.notes) == (["g"], [(str(empty), "it is empty")])
    with pytest.raises(ValueError, match="fewer than two characters of the vocabulary"):
        CharData([good], vocab=write(tmp_path, "v", "xyz"))
    with pytest.raises(BadFilesError, match="g: .*fewer than two characters .* to train on; lower val_fraction"):
        CharData([good], val_fraction=0.9)
    tiny = write(tmp_path, "tiny", "ab")
    data = CharData([good, tiny], skip_bad=True)
    assert (data.names, data.notes[0][0]) == (["g"], str(tiny))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(st.characters(exclude_categories=["Cs"])))
def test_an_alphabet_round_trips(tmp_path_factory, text, other):
    path = tmp_path_factory.mktemp("v") / "vocab.txt"
    alphabet = Alphabet(text)
    assert alphabet.vocab_size == len(set(text))
    assert alphabet.decode(alphabet.encode(text)) == text
    assert alphabet.unknown(other) == sorted(set(other) - set(text))
    known = "".join(c for c in other if c in text)
    assert alphabet.decode(alphabet.encode(other)).replace("\ufffd", "") == known.replace("\ufffd", "")
    if text.strip("\r"):
        alphabet.write(path)
        assert Alphabet.read(path).characters == sorted(set(text) - {"\r"})
    Alphabet("\ufeff😀").write(path)
    assert Alphabet.read(path).characters == ["\ufeff", "😀"]


def test_an_alphabet_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="v: byte 1 is not UTF-8"):
        Alphabet.read(write(tmp_path, "v", b"a\xff"))
    with pytest.raises(ValueError, match="v has no characters; it must have at least one"):
        Alphabet.read(write(tmp_path, "v", b"\r"))
    with pytest.raises(ValueError, match="characters is empty"):
        Alphabet("")
