"""What tests, benchmarks and `ctxkern check` share: the case table, the oracle, the peers, the measuring."""

from .force import force

__all__ = ["force"]
