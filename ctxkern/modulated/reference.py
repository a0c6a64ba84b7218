"""The reference's plan; its maths is `ctxkern.reference`, which `ctxkern.ops` calls without an operator."""

from .portable import modulated


def plan(operands, workspace_bytes, backward):
    """The plan of one projection: a whole weight per sequence."""
    return modulated.plan(operands, workspace_bytes, backward, "reference")
