"""Labels of the support sets of few-shot episodes: their checks, and the mean feature of each class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._validation import check_count, check_integers, check_like


def check_support_target(support_target: Tensor, support: Tensor, way: int) -> None:
    """Every support image has a class in [0, way), and every class of every episode an image.

    Args:
        support_target: ``[E, S]`` int64.
        support: ``[E, S, ...]`` features.
        way: classes an episode, at least 2.

    Raises:
        TypeError: targets that are not an int64 tensor, or a ``way`` that is no integer.
        ValueError: another shape or device, fewer than 2 classes, a target out of range, or a class without a
            support image.
    """
    check_integers("support_target", support_target, "[E, S]", 2)
    if support_target.shape != support.shape[:2]:
        raise ValueError(f"support_target: expected shape {list(support.shape[:2])}, got {list(support_target.shape)}")
    check_like("support", support, "support_target", support_target, any_dtype=True)
    check_count("way", way, 2)
    if ((support_target < 0) | (support_target >= way)).any():
        low, high = support_target.min().item(), support_target.max().item()
        raise ValueError(f"support_target: expected numbers in [0, {way}), got {low} to {high}")
    missing = (F.one_hot(support_target, way).sum(1) == 0).nonzero()
    if len(missing):
        episode, label = missing[0].tolist()
        raise ValueError(f"support_target: expected every class: class {label} of episode {episode} has no image")


def class_means(support: Tensor, support_target: Tensor, way: int) -> Tensor:
    """``[E, way, ...]``, the mean feature of each class's support images ``[E, S, ...]``, for checked targets.

    Example:
        >>> class_means(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[1, 0, 1]]), 2).flatten()
        tensor([3., 3.])
    """
    member = F.one_hot(support_target, way).to(support.dtype)  # [E, S, way]
    return torch.einsum("esw,es...->ew...", member / member.sum(1, keepdim=True), support)
