"""Tiles of the kernels and the blocks that a workspace holds: what a launch takes in addition to its operands."""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ctxkern.plan import forced

from .sizes import OPTIONS, cdiv, next_power_of_2


class Tile(NamedTuple):
    """rows × columns of a product's tile, its sum at a time, warps and copies in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def launch(self):
        return {"num_warps": self.warps, "num_stages": self.stages, **OPTIONS}


HALF, MIXED, FLOAT = "half", "mixed", "float32"
# float16 with float32 parameters, whose products are float32; float32 with parameters in halves
WIDE, NARROW = "wide", "narrow"
ALIGNED, UNALIGNED, ANY = "aligned", "unaligned", "any"
TABLE = Path(__file__).with_name("tile_table.csv")


def read_table(path=TABLE):
    """{(kernel, dtypes, architecture, layout): Tile}, as bench/tune.py wrote it.

    dtypes: half, float32; bfloat16 or float16 with float32 parameters (mixed, wide), float32 with halves (narrow):
    where these have no row, that of a half or of float32. layout: whether 16 divides the sizes, so that operands need
    not pass through registers. rows, columns and depth:

      panel_weights       columns of E × contexts, all of K at a time
      panel_weights_long  the same, K in several blocks; panel_dcontext's too
      panel_y, panel_dx   rows (panel_dx: those of panel_y) × columns of E or D, D or E at a time
      panel_g             D × E, rows at a time
      panel_dbilinear     columns of E × K, contexts at a time
      outer_y             rows × columns of E, K at a time
      outer_dx            rows × K, columns of E at a time
      outer_dbilinear     columns of E × K, rows at a time
      matmul              rows × columns, its sum at a time
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("kernel", "dtypes", "architecture", "layout")
    return {tuple(row[key] for key in keys): Tile(*(int(row[field]) for field in Tile._fields)) for row in rows}


_TILES = read_table()
# what follows from it: functions that clear that
AFTER = []


def forget():
    """To be called where the table was changed."""
    for clear in AFTER:
        clear()


# rows of D that a program of panel_weights goes through
WEIGHT_ROWS = 8


def weights_tile(kind, arch, aligned, columns, contexts, context_dim):
    """The `Tile` of panel_weights, and whether it holds all of K."""
    t = tile("panel_weights", kind, arch, aligned, columns, contexts, context_dim)
    if context_dim <= t.depth:
        return t, True
    return tile("panel_weights_long", kind, arch, aligned, columns, contexts, context_dim), False


def clip(size, largest):
    """A power of two from 16 to `largest` that holds `size` if it can."""
    return min(largest, max(16, next_power_of_2(size)))


def kind_of(dtype, mixed):
    """Which rows of the table a call takes: by the dtype of x, and whether parameters have another."""
    if dtype is torch.float32:
        return NARROW if mixed else FLOAT
    if not mixed:
        return HALF
    return WIDE if dtype is torch.float16 else MIXED


# kernels that multiply x or dy with W or G, all in the dtype of x
_OF_ROWS = ("panel_y", "panel_g", "panel_dx")


def _kinds(kernel, kind):
    """Where a row is looked for, the first first."""
    if kind == WIDE:
        return WIDE, HALF if kernel in _OF_ROWS else FLOAT
    return {MIXED: (MIXED, HALF), NARROW: (NARROW, FLOAT)}.get(kind, (kind,))


# architectures that the table has rows of; others whose names begin alike take theirs. Of the eights only sm_80 has
# more than 100 KB of shared memory per program; sm_120 has neither that nor a newer matrix unit
_FAMILIES = {"sm_80": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "sm_11": "sm_100", "gfx": "gfx942"}
_SMALLEST = "sm_89"


@cache
def architecture(device):
    """sm_90 and so on, gfx942 and so on; sm_90 where there is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return family(name)


def family(name):
    """The architecture whose tiles one takes."""
    return next((known for beginning, known in _FAMILIES.items() if name.startswith(beginning)), _SMALLEST)


def tile(kernel, kind, arch, aligned, rows, columns, depth):
    """The `Tile` of a kernel, cut to the sizes of a problem. aligned: whether 16 divides all sizes."""
    t = forced.tiles.get(kernel) or found(kernel, kind, arch, aligned)
    return t._replace(rows=clip(rows, t.rows), columns=clip(columns, t.columns), depth=clip(depth, t.depth))


@cache
def found(kernel, kind, arch, aligned):
    """The row of the table: of the architecture first, of the layout then, of the dtypes last."""
    layout = ALIGNED if aligned else UNALIGNED
    keys = [(kernel, k, a, at) for a in (arch, ANY) for at in (layout, ANY) for k in _kinds(kernel, kind)]
    return next(_TILES[key] for key in keys if key in _TILES)


AFTER.append(found.cache_clear)


# programs that keep a GPU busy: twice the multiprocessors of an H100
PROGRAMS = 264


def splits(size, programs, bytes_each, budget, least=16):
    """Into how many parts a sum over `size` is split so that there are programs enough, their sums within a budget.

    least: what a part has.
    """
    wanted = min(-(-PROGRAMS // max(programs, 1)), -(-size // least))
    return max(1, min(wanted, budget // max(bytes_each, 1)))


class Blocks(NamedTuple):
    """Rows of D, columns of a strip, strips of a launch, and contexts of a group."""

    rows: int
    width: int
    strips: int
    group: int


def _down(size, to):
    """size cut to a multiple of `to` where it reaches one."""
    return size if size < to else size // to * to


def _even(size, step):
    """The multiple of _NARROW by which size is cut into as many parts as by step, all about as large."""
    count = -(-size // step)
    return min(step, -(-size // (count * _NARROW)) * _NARROW) if count > 1 else step


# programs in the second direction of a launch, at most: contexts of a group
_GRID = 65_535
# rows or columns of a block from which products run at the tile's speed; smaller ones cost loads twice over
_NARROW = 64
# rows or columns of the largest tiles
_WIDE = 128


def _padded(size, whole):
    """How much more is computed than a block of `size` of `whole` asks for, as tiles have their own sizes."""
    if not size or size == whole:
        return 1.0
    tile = _WIDE if size > _NARROW else _NARROW
    return cdiv(size, tile) * tile / size


# what a launch costs, in bytes that memory moves meanwhile: 2 µs of an H100's, not measured
_LAUNCH_BYTES = 6 << 20
# operations of a large product while memory moves a byte: an H100's
_INTENSITY = 240
# bytes of W or G that are still in cache when they are read; those of larger blocks go to memory and back. Not measured
CACHED = 32 << 20


def _bytes_of_product(tokens, rows, columns, itemsize, more, padded=1.0):
    """What [tokens, rows] × [rows, columns] costs, in bytes that memory moves meanwhile; more: bytes of W or G."""
    moved = itemsize * tokens * (rows + columns) + more
    return max(moved, 2 * tokens * rows * columns * padded / _INTENSITY)


def forward_blocks(d_in, d_outs, limit, dtype, budget, tokens=0):
    """All of D by as many columns as hold all contexts, or fewer contexts where those would be too few.

    Fewer columns, which stay in cache, where reading x once more for each strip costs less than W's way to memory.
    """
    column, widest = d_in * dtype.itemsize, max(d_outs)
    group = min(max(limit, 1), _GRID)
    while group > 1 and column and budget // (column * group) < min(_NARROW, widest):
        group = -(-group // 2)

    def blocks_of(size):
        fit = max(1, size // max(column * group, 1))
        width = max(1, _even(widest, min(_down(fit, _WIDE if fit > _WIDE else _NARROW), widest)))
        strips = sum(-(-d_out // width) for d_out in d_outs)
        return Blocks(d_in, width, min(strips, max(1, fit // width)), group)

    def cost(blocks):
        width = blocks.width * blocks.strips
        made = column * group * width
        made = made if made > CACHED else 0
        product = _bytes_of_product(tokens, d_in, width, dtype.itemsize, made)
        return -(-sum(d_outs) // max(width, 1)) * (made + product + 2 * _LAUNCH_BYTES)

    return min((blocks_of(size) for size in sorted({budget, min(budget, CACHED)}, reverse=True)), key=cost)


def backward_blocks(tokens, d_in, d_outs, context_dim, limit, dtype, param_dtype, budget, whole=False):
    """Rows of D by columns of E that hold G of all contexts, then W in its place, and cost least; else fewer contexts.

    A block reads x and dy, and dy again for dx; where it has not all columns, dx goes through memory in float32, [N,
    rows]: no more bytes than x has. G and W that do not stay in cache are each written and read once. whole: all
    columns if enough rows fit with them.
    """
    element = dtype.itemsize
    sums = (context_dim + 1) * torch.float32.itemsize
    group, total = min(max(limit, 1), _GRID), sum(d_outs)
    candidates = [(max(*d_outs, 1), strips) for strips in sorted({len(d_outs), 1}, reverse=True)]
    while candidates[-1][0] > _NARROW:
        candidates.append((max(_down(-(-candidates[-1][0] // 2), 16), _NARROW), 1))

    def fit(width, strips, size=budget):
        return size // max(width * strips * (group * element + (sums if group < limit else 0)), 1)

    def rows_of(width, strips, size):
        rows = max(1, fit(width, strips, size))
        if width * strips < total:
            rows = max(1, min(rows, d_in * dtype.itemsize // torch.float32.itemsize))
        return _even(d_in, min(_down(rows, _WIDE if rows > _WIDE else _NARROW), d_in))

    def cost(width, strips, rows):
        columns = min(width * strips, total)
        count = -(-d_in // max(rows, 1)) * -(-total // max(columns, 1))
        made = max(limit, 1) * rows * columns * element
        made = made if group * rows * columns * element > CACHED else 0
        summed = 2 * torch.float32.itemsize * tokens * rows if columns < total else 0
        padded = _padded(rows, d_in) * _padded(columns, total)
        product = _bytes_of_product(tokens, rows, columns, element, made, padded)
        return count * (2 * (product + made) + summed + 4 * _LAUNCH_BYTES)

    while group > 1 and max(fit(*candidate) for candidate in candidates) < min(16, d_in):
        group = -(-group // 2)
    fitting = [candidate for candidate in candidates if fit(*candidate)] or candidates[-1:]
    if whole and fit(*candidates[0]) >= min(_NARROW, d_in):
        fitting = candidates[:1]
    sizes = sorted({budget, min(budget, CACHED)}, reverse=True)
    shapes = [(*candidate, rows_of(*candidate, size)) for candidate in fitting for size in sizes]
    width, strips, rows = min(shapes, key=lambda shape: cost(*shape))
    return Blocks(rows, width, min(strips, sum(-(-d_out // width) for d_out in d_outs)), group)
