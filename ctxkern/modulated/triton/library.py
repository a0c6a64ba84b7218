"""Products with rows of x and dy by torch's library, where every context has as many rows, in the order of the table.

  y[u, s, e] = Σ_d x[u, s, d] W[u, d, e]      [U, S, D] × [U, D, strip]
  G[u, d, e] = Σ_s x[u, s, d] dy[u, s, e]     [U, rows of D, S] × [U, S, strip]
  dx[u, s, d] = Σ_e dy[u, s, e] W[u, d, e]    [U, S, strip] × [U, strip, rows of D]

These read and write the workspace of panel.py in place of panel_y, panel_g and panel_dx: a product per strip. A bias is
added while y is near, as a product that adds to what is there costs more. dx of several projections adds up in the
dtype of x, as it does in three separate calls.
"""

from ctxkern.runtime.triton.launches import View


def _strips(alike, block):
    """[(slot, projection, first column, how many)] of a block."""
    found = [
        (projection, begin, min(block.width, d_out - begin))
        for projection, d_out in zip(alike.members, alike.d_outs, strict=True)
        for begin in range(0, d_out, block.width)
    ]
    return [(slot, *each) for slot, each in enumerate(found[block.first_strip : block.first_strip + block.strips])]


def _rows(call, operand, block, begin, size):
    """[contexts of a block, S, columns] of x, y, dy or dx."""
    length, columns = call.length, operand.shape[-1]
    shape = (block.u_size, length, size)
    return View(operand.at, block.u_begin * length * columns + begin, shape, (length * columns, columns, 1))


def _cells(panel, block, slot, size):
    """[contexts, rows of D, columns] of W or G of a strip."""
    region = block.d_size * block.width
    return View(panel.at, slot * block.u_size * region, (block.u_size, block.d_size, size), (region, block.width, 1))


def library_y(call, alike, panel, block):
    x = _rows(call, call.x, block, 0, call.d_in)
    for slot, projection, begin, size in _strips(alike, block):
        bias = projection.bias and View(projection.bias.at, begin, (size,), (1,))
        y = _rows(call, projection.rows.matrix(), block, begin, size)
        call.layout.product(x, _cells(panel, block, slot, size), y, bias=bias)


def library_g(call, alike, grads, block):
    x = _rows(call, call.x, block, block.d_begin, block.d_size)
    for slot, projection, begin, size in _strips(alike, block):
        dy = _rows(call, projection.rows.matrix(), block, begin, size)
        call.layout.product(x.t(), dy, _cells(grads, block, slot, size))


def library_dx(call, alike, panel, dx, block):
    """dx of a block that has all columns."""
    out = _rows(call, dx.matrix(), block, block.d_begin, block.d_size)
    for slot, projection, begin, size in _strips(alike, block):
        dy = _rows(call, projection.rows.matrix(), block, begin, size)
        call.layout.product(dy, _cells(panel, block, slot, size).t(), out, added=slot > 0)
