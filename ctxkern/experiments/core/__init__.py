"""What experiments share: settings, the training loop, checkpoints, logs, plots, text data and generation.

Nothing here imports from an experiment. `experiment.py` is the place to start reading.
"""
