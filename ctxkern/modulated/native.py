"""What the backends cpu and cuda share before their kernels."""

from ctxkern.modulated.operands import Operands, contiguous

# of a workspace, where a caller names more than an int64 holds
MOST_BYTES = 1 << 60


def without_gaps(operands):
    """The same with what kernels read row by row made contiguous; weights and bilinears stay as they lie."""
    x, context, weights, bilinears, biases, index, bounds = operands
    if index is bounds is None and x.is_contiguous() and context.is_contiguous():
        for bias in biases:
            if bias is not None and not bias.is_contiguous():
                break
        else:
            return operands
    biases = [contiguous(bias) for bias in biases]
    return Operands(
        contiguous(x), contiguous(context), weights, bilinears, biases, contiguous(index), contiguous(bounds)
    )
