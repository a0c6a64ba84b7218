"""The same call by several numbers of threads."""

import torch


def the_same_by(counts, call, names=None):
    """What call() gives, tensors by name; no number of threads changes a bit of those named, or of any."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    for count, other in zip(counts[1:], found[1:], strict=True):
        for name in names or other:
            assert torch.equal(other[name], found[0][name]), f"{name} of {count} threads"
    return found[0]
