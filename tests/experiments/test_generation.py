import pytest
import torch

from ctxkern.experiments.core.generation import choose_tokens, generate_answers, generate_tokens
from ctxkern.experiments.core.tokenizers import ByteTokenizer

# probabilities .5 .3 .15 .05, in another order
PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def drawn(count=4000, **options):
    """The tokens of `count` draws with their shares."""
    logits = PROBABILITIES.log().expand(count, 4)
    tokens = choose_tokens(logits, generator=torch.Generator().manual_seed(0), **options)
    shares = torch.bincount(tokens, minlength=4) / count
    return {token: share for token, share in enumerate(shares.tolist()) if share}


def assert_shares(actual, expected):
    assert actual.keys() == expected.keys()
    for token, share in expected.items():
        # about four standard deviations
        assert actual[token] == pytest.approx(share, abs=0.03)


def test_sampling_follows_the_softmax():
    assert_shares(drawn(), {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3})
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert_shares(drawn(temperature=0.5), dict(enumerate(squared.tolist())))
    assert drawn(temperature=0) == {1: 1.0}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        # .5 and .3 are .625 and .375 of what top_k leaves
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(options, kept):
    total = sum(PROBABILITIES[i].item() for i in kept)
    assert_shares(drawn(**options), {i: PROBABILITIES[i].item() / total for i in kept})


def test_bad_options_are_named():
    logits = torch.zeros(1, 3)
    for options, message in (
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1, or None"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_tokens(logits, **options)


def counting(tokens, caches, start):
    """A model that says the number after the last one, and that knows all tokens so far only from its cache."""
    k, _ = caches[0].append(*(tokens[:, None, :, None].float(),) * 2)
    assert k.shape[2] == start + tokens.shape[1]
    return torch.nn.functional.one_hot(tokens + 1, 300).float()


@pytest.mark.parametrize("use_cache", [True, False])
def test_any_model_is_continued_past_its_window(use_cache):
    inputs = torch.tensor([[1, 2, 3], [11, 12, 13]])
    out = generate_tokens(counting, inputs, num_layers=1, seq_len=4, max_new_tokens=9, use_cache=use_cache)
    assert out.tolist() == [list(range(1, 13)), list(range(11, 23))]
    ended = generate_tokens(counting, inputs, num_layers=1, seq_len=4, max_new_tokens=9, eos_id=14, use_cache=use_cache)
    assert ended.tolist()[1] == [11, 12, 13, *[14] * 9]


def test_answers_come_in_the_order_of_the_prompts_and_end_at_eos():
    tokenizer, calls = ByteTokenizer(), []

    def run(inputs, rows):
        calls.append(rows)
        said = torch.tensor([[*f"{row}!".encode(), tokenizer.eos_id, 65] for row in rows])
        return torch.cat([inputs, said], 1)

    assert generate_answers(run, tokenizer, ["aa", "b", "cc"], torch.device("cpu")) == ["0!", "1!", "2!"]
    assert calls == [[1], [0, 2]]
