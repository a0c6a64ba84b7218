"""A GPT on characters of one text or of several, each with a context. Read `model.py`, `data.py`, then `train.py`."""
