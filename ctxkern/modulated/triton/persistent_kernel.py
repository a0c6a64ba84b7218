"""Panel forward in one launch: while a strip is projected the next one is made, so that `bilinear` streams meanwhile.

Programs claim tiles in a fixed order from a counter: those that make strip 0; then, for each strip, those that project
it, mixed evenly with those that make the next one; the last strip's alone. Strips lie in a ring of RING slots. For
every block of columns of a strip two counters tell how many tiles have been made and how many projected:

  project a tile of strip s    waits until its columns have been made
  make a tile of strip s       waits until its columns of strip s - RING, whose slot it takes, have been projected

A tile waits only for tiles that were claimed before it, by programs that run: there is no deadlock, however few run at
a time. What a tile wrote is released by the counter it adds to and acquired by whoever waits for that (PTX ISA, memory
consistency model).
"""

import triton
import triton.language as tl

from ctxkern.runtime.triton.device import kernel, wide

from .panel_kernels import make_tile, project_tile

# slots of strips: one that is made, one that is projected
RING = 2


@triton.jit
def _wait(counter_ptr, wanted):
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < wanted:
        pass


@triton.jit
def _signal(counter_ptr):
    tl.debug_barrier()  # all threads of the program have stored
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _turn_of(claimed, makes, projects, strips):
    """The claimed tile: whether it makes, its strip, and its number among those of that strip which do the same.

    After the first `makes` tiles come spans of makes + projects, in which tile r makes where r·makes / (makes +
    projects) passes a whole number; in the last span there is nothing to make.
    """
    span = makes + projects
    later = claimed - makes
    strip = tl.maximum(later, 0) // span
    at = wide(tl.maximum(later, 0) % span)
    before = (at * makes) // span
    makes_now = ((at + 1) * makes) // span > before
    last = strip == strips - 1
    makes_now = makes_now & (strip < strips - 1)
    inside = tl.where(makes_now, before, tl.where(last, at, at - before)).to(tl.int32)
    strip += tl.where(makes_now, 1, 0)
    return (
        makes_now | (later < 0),
        tl.where(later < 0, 0, strip),
        tl.where(later < 0, claimed, inside),
    )


@kernel
def _panel_persistent_kernel(
    # tensors
    x_ptr,  # [N, D]
    context_ptr,  # [F, K]
    bilinears,  # of each projection [D, E, K]
    weights,  # [D, E] each
    biases,  # [E] each
    outs,  # [N, E] each
    groups_ptr,
    ring_ptr,  # [RING, U, D, width]
    claim_ptr,  # zeros: the next tile; tiles made [strips, blocks]; tiles projected [strips, blocks]
    # strides
    strides_t,
    strides_w,
    # sizes
    d_outs,
    limit,
    tiles,
    length,
    context_dim,
    d_in,
    width,
    strips,
    # tiles
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,  # divides BLOCK_N
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RING: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_N)
    contexts = tl.cdiv(limit, BLOCK_U)
    chunks = tl.cdiv(d_in, ROWS) * contexts
    e_blocks = tl.cdiv(width, BLOCK_E)
    makes = e_blocks * chunks
    projects = tiles * blocks
    made_ptr = claim_ptr + 1
    projected_ptr = made_ptr + strips * blocks
    claimed = tl.atomic_add(claim_ptr, 1, sem="relaxed")
    while claimed < strips * (makes + projects):
        makes_now, strip, at = _turn_of(claimed, makes, projects, strips)
        slot = strip % RING
        if makes_now:
            # contexts side by side: they read the same of `bilinear`
            piece = at // contexts
            block = (piece % e_blocks) * BLOCK_E // BLOCK_N
            if strip >= RING:
                _wait(projected_ptr + (strip - RING) * blocks + block, tiles)
            make_tile(
                bilinears,
                weights,
                context_ptr,
                groups_ptr,
                ring_ptr,
                None,
                None,
                strides_t,
                strides_w,
                d_outs,
                limit,
                context_dim,
                0,
                d_in,
                width,
                0,
                limit,
                strip,
                slot,
                piece,
                (at % contexts) * BLOCK_U,
                0,
                ROWS,
                BLOCK_E,
                BLOCK_U,
                BLOCK_K,
                WHOLE_K,
                HAS_WEIGHT,
                True,
                False,
                UNIFORM,
                DTYPE,
                PRECISION,
            )
            _signal(made_ptr + strip * blocks + block)
        else:
            block = at % blocks
            made_of = tl.cdiv(tl.minimum(BLOCK_N, width - block * BLOCK_N), BLOCK_E) * chunks
            _wait(made_ptr + strip * blocks + block, made_of)
            project_tile(
                x_ptr,
                ring_ptr,
                biases,
                groups_ptr,
                outs,
                d_outs,
                limit,
                tiles,
                length,
                d_in,
                width,
                0,
                limit,
                strip,
                slot,
                block * BLOCK_N,
                at // blocks,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                HAS_BIAS,
                UNIFORM,
                ORDERED,
                PRECISION,
            )
            _signal(projected_ptr + strip * blocks + block)
        claimed = tl.atomic_add(claim_ptr, 1, sem="relaxed")
