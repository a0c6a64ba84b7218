"""What contexts do in a trained run: `ctxkern report`. `analyse.py` is the place to start reading."""
