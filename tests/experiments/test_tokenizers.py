import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxkern.experiments.core.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)


@given(st.text(), st.text())
def test_tokenizers_round_trip(text, other):
    tokenizer = CharTokenizer.from_texts([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.pad_id, tokenizer.sep_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert all(len(CharTokenizer.specials) <= i < tokenizer.vocab_size for i in ids)
    expected = "".join(c if c in text else "\ufffd" for c in other)
    assert tokenizer.decode(tokenizer.encode(other)) == expected
    byte = ByteTokenizer()
    assert byte.decode([*byte.encode(text), byte.eos_id]) == text
    assert tokenizer_from_json(byte.to_json()) == byte


def test_tokenizer_file_and_errors(tmp_path):
    tokenizer = CharTokenizer("aé\n\u2028")
    # joined in JSON, these two would be read back as one character
    surrogates = CharTokenizer("\ud83d\ude00")
    assert tokenizer_from_json(surrogates.to_json()) == surrogates
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json") == tokenizer
    for text in ("{", "[]", '{"type": "words"}', '{"type": "chars"}'):
        with pytest.raises(ValueError, match="tokenizer"):
            tokenizer_from_json(text)
    with pytest.raises(ValueError, match="an id is 8; it must be from 0 to 7"):
        tokenizer.decode([8])
    with pytest.raises(TypeError, match="'ab'"):
        CharTokenizer(["ab"])
