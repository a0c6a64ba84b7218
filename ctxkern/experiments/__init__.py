"""Training programs built on the layers of `ctxkern`; they need `pip install 'ctxkern[train]'`.

`EXPERIMENTS` lists them: the subcommand of `ctxkern`, and the `Experiment` class behind it.
"""

EXPERIMENTS = {
    "train": "ctxkern.experiments.multifile.experiment:MultiFileTraining",
}
