"""The numbers of `ctxkern report`: planted structure is found, its absence is not called structure."""

import math

import pytest
import torch
from helpers.attached import assert_near

from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.multifile.analysis.attention import (
    Window,
    _own,
    attention_maps,
    divergence,
    pairwise_divergence,
)
from ctxkern.experiments.multifile.analysis.families import find_families, read_families
from ctxkern.experiments.multifile.analysis.measures import (
    Neighbours,
    contrast,
    cosines,
    interval,
    jensen_shannon,
    numbered,
    permuted,
    principal_axes,
    sign_flips,
    spectrum_ranks,
)
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer

K, SEQ = 6, 7
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 2, "context_dim": K, "seq_len": SEQ, "init": "hyperfan"}
    return MultiFileTransformer(MultiFileConfig(11, len(LABELS), **sizes | changes)).double().eval()


def planted(spread, seed=0):
    """Contexts [10, K] around the centre of their family."""
    rng = generator(seed, "planted")
    centres = torch.eye(K, dtype=torch.float64)[:4] * K**0.5
    return centres[LABELS] + spread * torch.randn(len(LABELS), K, generator=rng, dtype=torch.float64)


def nearest(vectors):
    return Neighbours(cosines(vectors @ vectors.T), 3)


@pytest.mark.parametrize("k", [1, None])
def test_planted_families_are_found(k):
    neighbours = nearest(planted(0.05))
    null = permuted(lambda order: neighbours.purity(order, k), LABELS, 300, generator(0))
    assert null.observed == pytest.approx(1.0)
    assert null.p == 1 / 301
    assert null.mean < 0.5


def test_random_contexts_have_no_families():
    found = []
    for seed in range(8):
        neighbours = nearest(torch.randn(len(LABELS), K, generator=generator(seed), dtype=torch.float64))
        found.append(permuted(lambda order, n=neighbours: n.purity(order), LABELS, 200, generator(seed, "order")))
    # the expectation under random labels: 2 of the 9 others, for those of families of three
    assert sum(null.mean for null in found) / 8 == pytest.approx(2 / 9, abs=0.02)
    assert sum(null.p < 0.05 for null in found) <= 2
    assert sum(null.p for null in found) / 8 > 0.2


def test_purity_by_hand():
    # 0 is nearest to 1, 1 to 0, 2 to 1, 3 to 2
    places = torch.tensor([0.0, 1.0, 2.5, 4.5])
    similarity = -(places[:, None] - places).abs()
    assert Neighbours(similarity, 3).purity(torch.tensor([0, 0, 1, 1])) == pytest.approx(3 / 4)
    # the last one has no relatives
    assert Neighbours(similarity, 3).purity(torch.tensor([0, 1, 0, 2]), 1) == 0
    assert math.isnan(Neighbours(similarity, 3).purity(torch.arange(4)))


def test_equal_contexts_prefer_no_order():
    # all are equally near: a purity by order would be 1 or 0
    assert nearest(torch.ones(len(LABELS), K).double()).purity(LABELS) == pytest.approx(2 / 9)


def test_principal_axes_are_those_of_the_vectors():
    vectors = torch.randn(12, 3, dtype=torch.float64, generator=generator(0))
    places, shares = principal_axes(vectors @ vectors.T)
    centred = vectors - vectors.mean(0)
    values = torch.linalg.svdvals(centred).square()
    torch.testing.assert_close(shares, values[:2] / values.sum())
    torch.testing.assert_close(places.square().sum(0), values[:2])


def test_divergence_of_equal_and_disjoint_distributions():
    p = torch.rand(5, 4, dtype=torch.float64).softmax(1)
    assert not jensen_shannon(p, p).any()
    left, right = torch.tensor([[0.3, 0.7, 0, 0]]).double(), torch.tensor([[0, 0, 0.5, 0.5]]).double()
    torch.testing.assert_close(jensen_shannon(left, right), torch.tensor([math.log(2)], dtype=torch.float64))
    q = p.roll(1, 0)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)) / 2
    torch.testing.assert_close(jensen_shannon(p, q), expected)


def test_effective_ranks_of_known_spectra():
    assert spectrum_ranks(torch.tensor([4.0, 4.0, 4.0, 0.0])) == pytest.approx((3.0, 3.0))
    assert spectrum_ranks(torch.tensor([9.0, 0.0])) == pytest.approx((1.0, 1.0))
    entropy, participation = spectrum_ranks(torch.tensor([3.0, 1.0]).double())
    assert entropy == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert participation == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert all(map(math.isnan, spectrum_ranks(torch.zeros(3))))


def test_p_values_by_sign_flips_and_intervals():
    assert sign_flips(torch.tensor([1.0, 2.0, 3.0]), generator(0)) == 1 / 8
    assert sign_flips(torch.tensor([-1.0, -2.0, -3.0]), generator(0)) == 1
    assert sign_flips(torch.zeros(30), generator(0)) == 1
    assert sign_flips(torch.ones(30), generator(0)) == pytest.approx(1 / 10_001)
    low, high = interval(torch.tensor([1.0, 1.0, 1.0]), generator(0))
    assert (low, high) == (1, 1)
    low, high = interval(torch.arange(100.0), generator(0))
    # about ±1.96 standard errors of 2.9
    assert 42 < low < 46 < 53 < high < 57
    assert math.isnan(interval(torch.ones(1), generator(0))[0])


@pytest.mark.parametrize("changes", [{}, {"rank": 3}, {"attention": "einsum"}])
def test_attention_maps_are_softmax_by_hand(changes):
    model = make_model(**changes)
    tokens = torch.randint(11, (3, SEQ), generator=generator(0))
    contexts = model.contexts()[:3].detach()
    maps = attention_maps(model, tokens, contexts)
    assert maps.shape == (2, 3, 2, SEQ, SEQ)
    positions = torch.arange(SEQ)
    with torch.no_grad():
        x = model.token_embeddings(tokens) + model.position_embeddings(positions)
        for number, block in enumerate(model.blocks):
            seen = block.attention_norm(x)
            q, k, _ = block.attention.qkv(seen, contexts, None)
            q, k = (t.view(3, SEQ, 2, 4).permute(0, 2, 1, 3) for t in (q, k))
            scores = (q @ k.mT / 2).masked_fill(positions[:, None] < positions, -math.inf)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            torch.testing.assert_close(maps[number], weights)
            x = block(x, contexts)
    torch.testing.assert_close(
        attention_maps(model, tokens, contexts, queries=torch.tensor([1, 4])), maps[..., [1, 4], :]
    )


def windows(count, seed=0):
    rng = generator(seed, "windows")
    return [Window(torch.randint(11, (SEQ,), generator=rng), i % len(LABELS)) for i in range(count)]


def test_pairs_of_contexts_are_compared_on_one_input():
    model, contexts = make_model(), planted(0.5)
    (window,) = windows(1)
    pairs = pairwise_divergence(model, window, contexts)
    maps = attention_maps(model, window.tokens.expand(len(contexts), -1), contexts)
    expected = jensen_shannon(maps[:, 3, :, 1:], maps[:, 7, :, 1:]).mean()
    torch.testing.assert_close(pairs[3, 7], expected)
    assert not pairs.diagonal().any()
    assert torch.equal(pairs, pairs.T)


def test_divergence_finds_planted_families_alone():
    model = make_model()
    found = divergence(model, planted(0.05), windows(10), LABELS, 200, generator(0))
    assert found.families.p == pytest.approx(1 / 201)
    assert found.between > 3 * found.within
    torch.testing.assert_close(
        torch.tensor(found.families.observed), torch.tensor(contrast(found.pairs, LABELS)), rtol=0, atol=0
    )
    ps = []
    for seed in range(6):
        contexts = torch.randn(len(LABELS), K, generator=generator(seed), dtype=torch.float64)
        none = divergence(model, contexts, windows(10, seed), LABELS, 100, generator(seed, "p"))
        # large all the same
        assert none.mean > found.within
        ps.append([none.families.p, none.own.p, none.p])
    assert (torch.tensor(ps) < 0.05).sum() <= 3
    assert torch.tensor(ps).mean() > 0.25


def test_own_and_other_contexts_by_hand():
    model, contexts, seen, count = make_model(), planted(0.5), windows(4), len(LABELS)
    found = divergence(model, contexts, seen, LABELS, 20, generator(0))
    excess, own = [], []
    for window in seen:
        pairs, mine = pairwise_divergence(model, window, contexts), window.file_id
        others = [f for f in range(count) if f != mine]
        own.append(sum(float(pairs[mine, f]) for f in others) / len(others))
        rest = [float(pairs[f, g]) for f in others for g in others if f != g]
        excess.append(own[-1] - sum(rest) / len(rest))
    assert found.own.observed == pytest.approx(sum(excess) / len(excess))
    assert found.trained == pytest.approx(sum(own) / len(own))
    assert found.random == pytest.approx(found.trained - float(found.difference.mean()))


def test_a_context_that_fits_its_file_stands_apart():
    count = len(LABELS)
    # on the input of a file, its context is far from the others, which are alike
    each = 0.1 * torch.ones(count, count, count, dtype=torch.float64)
    rows = torch.arange(count)
    each[rows, rows, :] = each[rows, :, rows] = 0.3
    each.diagonal(dim1=1, dim2=2).zero_()
    assert _own(each, rows, 200, generator(0)).p == pytest.approx(1 / 201)
    assert _own(each.roll(1, 0), rows, 200, generator(0)).p > 0.5
    # one context that is far from all on every input fits none
    same = each[:1].expand(count, -1, -1)
    assert _own(same, rows, 200, generator(0)).p == 1


def test_a_model_without_modulation_has_no_divergence():
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bilinear" in name:
                parameter.zero_()
    found = divergence(model, planted(0.5), windows(10), LABELS, 50, generator(0))
    means = torch.tensor([found.mean, found.trained, found.random], dtype=torch.float64)
    torch.testing.assert_close(means, torch.zeros_like(means))
    assert not found.difference.any()
    assert found.families.p == found.own.p == found.p == 1


def test_families_by_names(tmp_path):
    def of(*names):
        return find_families([name.rpartition("/")[2] for name in names], [tmp_path / name for name in names])

    found = of("logical_deduction_five.json", "logical_deduction_two.json", "snarks.json", "web_of_lies.json")
    assert found.names == ["logical_deduction_*"] * 2 + ["snarks.json", "web_of_lies.json"]
    assert "logical_deduction_* (2); 2 files alone; by the first words" in found.describe()
    # a word that all begin with says nothing
    assert of("x_a_1.txt", "x_a_2.txt", "x_b_1.txt").names == ["x_a_*", "x_a_*", "x_b_1.txt"]
    assert of("train/p.json", "train/q.json", "test/r.json").names == ["train", "train", "test"]
    assert of("p.py", "q.py", "r.md").names == [".py", ".py", ".md"]
    assert not of("p.py", "q.py").known
    variants = find_families(["p", "q", "p#1", "q#1"], [tmp_path / "p", tmp_path / "q"])
    assert variants.names == ["p", "q", "p", "q"]


def test_families_from_a_file(tmp_path):
    place = tmp_path / "families.csv"
    place.write_text("name,family\na,x\nc,x\n")
    assert read_families(place, ["a", "b", "c"]).names == ["x", "b", "x"]
    for text, words in (
        ("name,kind\na,x\n", "it must have name and family"),
        ("name,family\nd,x\n", "has the name 'd'; it must be one of a, b, c"),
        ("name,family\na,x\na,y\n", "has 'a' twice"),
    ):
        place.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_families(place, ["a", "b", "c"])


def test_labels_follow_names():
    assert numbered(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert_near(cosines(torch.tensor([[4.0, 2.0], [2.0, 1.0]])), torch.ones(2, 2))
    assert not cosines(torch.zeros(2, 2)).any()
