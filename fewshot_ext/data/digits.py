"""The handwritten digits that scikit-learn ships: real images that need no download."""

import numpy as np

from fewshot_ext import _extras
from fewshot_ext.data.archive import ImageArchive, Split


def load_digits() -> ImageArchive:
    """1797 handwritten digits, 8 x 8 gray pixels, with 0-4 as base classes and 5-9 as novel classes.

    The images are the test part of the UCI "Optical Recognition of Handwritten Digits" set, as
    ``sklearn.datasets.load_digits`` gives them; its 17 gray levels are spread over 0..255.

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> digits = load_digits()
        >>> digits
        ImageArchive(1797 images of 1 x 8 x 8; classes: 5 base, 5 novel)
        >>> digits.subset(Split.NOVEL).class_names
        ('5', '6', '7', '8', '9')
    """
    _extras.require("train", "sklearn")
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    return ImageArchive.from_arrays(
        images=np.rint(digits.images * (255 / 16)).astype(np.uint8),
        labels=digits.target,
        class_names=[str(name) for name in digits.target_names],
        class_split=np.where(digits.target_names < 5, Split.BASE, Split.NOVEL),
    )
