"""Tables of text."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of as many cells as lines, their columns aligned on the right, those numbered in `left` on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = []
    for cells in rows:
        padded = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        shown.append("  ".join(padded).rstrip())
    return "\n".join(shown)
