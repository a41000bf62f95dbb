"""What the tests of ``fewshot-ext retrieve`` share."""

import torch

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, load_digits


def run(checkpoint, output, *arguments):
    return main(["retrieve", "--checkpoint", str(checkpoint), "--output", str(output), "--threads", "1", *arguments])


def few_digits(path):
    """The first twenty digits of each class of the unseen, as a file."""
    digits = load_digits()
    kept = torch.cat([(digits.labels == label).nonzero().flatten()[:20] for label in range(5, 10)])
    images, labels = digits.images[kept], digits.labels[kept]
    ImageArchive(images, labels, digits.class_names, digits.class_split).save(path)
    return images, labels
