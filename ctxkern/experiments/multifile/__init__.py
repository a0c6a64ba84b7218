"""One model trained on many files at once, each file with a context vector that modulates the attention."""
