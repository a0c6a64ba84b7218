"""Cases that hypothesis draws."""

from hypothesis import settings
from hypothesis import strategies as st

from ctxkern.testing.cases import Case

bounded = settings(max_examples=80, deadline=None, derandomize=True, database=None)
LAYOUTS = ("contiguous", "permuted", "strided", "expanded")


@st.composite
def cases(draw, per_token=None, packed=None, indexed=None, least=0):
    """A case of small sizes: padded or packed, with or without an index, or a context per token."""

    def choose(asked):
        return draw(st.booleans()) if asked is None else asked

    B = draw(st.integers(least, 5))
    S = draw(st.integers(least, 6))
    D, E, K = (draw(st.integers(least, 9)) for _ in range(3))
    per_token = choose(per_token)
    packed = not per_token and choose(packed)
    rows = draw(st.integers(1, 7)) if not per_token and choose(indexed) else None
    return Case(
        "drawn",
        B,
        0 if packed else S,
        D,
        E,
        K,
        rows=rows,
        index=None if rows is None else tuple(draw(st.lists(st.integers(0, rows - 1), min_size=B, max_size=B))),
        lengths=tuple(draw(st.lists(st.integers(0, 6), min_size=B, max_size=B))) if packed else None,
        per_token=per_token,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(("contiguous", "strided"))),
        bilinear_layout=draw(st.sampled_from(LAYOUTS)),
    )
