"""`ctxkern compare`: ways to give a model a context, and models without one, on the same files."""
