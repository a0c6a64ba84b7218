"""A small case of each kind of call, for what need not go over the whole table."""

from ctxkern.dtypes import FLOATS
from ctxkern.testing.cases import CASES, Case

BY_ID = {case.id: case for case in CASES}
DTYPES = list(FLOATS)
SHARED = Case("shared", 5, 4, 6, 8, 3, rows=4, index=(3, 0, 3, 1, 0), bias=True)
PADDED = Case("padded", 3, 5, 6, 8, 4, bias=True)
RAGGED = Case("ragged", 4, 0, 6, 8, 3, lengths=(3, 0, 5, 2), bias=True)
PER_TOKEN = Case("per-token", 2, 3, 6, 4, 3, per_token=True)
CHECKED = [
    *(BY_ID[name] for name in ("tiny", "no-weight", "shared-uneven", "ragged-shared", "ragged-empty-sequences")),
    *(BY_ID[name] for name in ("context-per-token", "permuted-bilinear", "expanded-bilinear")),
    *(BY_ID[name] for name in ("table-larger-than-batch", "empty-batch", "empty-context", "empty-packed")),
]
