"""Image archives, augmentation in batches, and episode sampling."""

from fewshot_ext.data.archive import ImageArchive, Split
from fewshot_ext.data.augmentation import AugmentationConfig, ImageInput
from fewshot_ext.data.batches import ShuffledBatches, training_batches
from fewshot_ext.data.digits import load_digits
from fewshot_ext.data.episodes import Episodes, sample_episodes

__all__ = [
    "AugmentationConfig",
    "Episodes",
    "ImageArchive",
    "ImageInput",
    "ShuffledBatches",
    "Split",
    "load_digits",
    "sample_episodes",
    "training_batches",
]
