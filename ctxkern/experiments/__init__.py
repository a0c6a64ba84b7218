"""Training programs built on the layers of :mod:`ctxkern`; they need ``pip install 'ctxkern[train]'``."""
