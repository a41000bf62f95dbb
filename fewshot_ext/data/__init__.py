"""Image archives and picture files, class splits, augmentation in batches, and episode sampling."""

from fewshot_ext.data.archive import ImageArchive, Split
from fewshot_ext.data.augmentation import AugmentationConfig, ImageInput
from fewshot_ext.data.batches import ShuffledBatches, training_batches
from fewshot_ext.data.cifar import load_cifar100
from fewshot_ext.data.digits import load_digits
from fewshot_ext.data.episodes import Episodes, sample_episodes
from fewshot_ext.data.folders import read_folder
from fewshot_ext.data.mnist import load_mnist
from fewshot_ext.data.named import load_images
from fewshot_ext.data.pictures import contact_sheet, read_image
from fewshot_ext.data.pk_batches import PKBatches
from fewshot_ext.data.splits import SPLIT_NAMES, ClassSplit, load_split
from fewshot_ext.data.walk import list_images

__all__ = [
    "SPLIT_NAMES",
    "AugmentationConfig",
    "ClassSplit",
    "Episodes",
    "ImageArchive",
    "ImageInput",
    "PKBatches",
    "ShuffledBatches",
    "Split",
    "contact_sheet",
    "list_images",
    "load_cifar100",
    "load_digits",
    "load_images",
    "load_mnist",
    "load_split",
    "read_folder",
    "read_image",
    "sample_episodes",
    "training_batches",
]
