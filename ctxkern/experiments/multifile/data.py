"""The data of multi-file training, which other experiments share: items with file ids, windows, mixed batches."""

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.reading import load_file
from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.data.windows import Collator, EncodedDataset, build_sequence

__all__ = ["Collator", "EncodedDataset", "MixedFileBatchSampler", "MultiFileDataset", "build_sequence", "load_file"]
