"""Conformal prediction by leave-one-out: p-values of queries among the images of a support set."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._validation import check_number
from fewshot_ext.heads.vectors import Head

# Features are copied for every head that is fitted; a call that fits them is repeated for more queries than go in here.
_BYTES_AT_ONCE = 2**27
# Levels such as 1 - 0.9 are rounded, and ranks fall right on them.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class PValues:
    """How well Q queries fit to a support set of S images, as ranks among its own images.

    Every value is a multiple of 1 / (S + 1), from that to 1.

    Attributes:
        known: ``[Q]`` float64, of the query being of any known class.
        labels: ``[Q, way]`` float64, of each class being the query's.
    """

    known: Tensor
    labels: Tensor

    def rejected(self, level: float) -> Tensor:
        """``[Q]`` bool, the queries of no known class at this level; see ``leave_one_out``."""
        return self.known <= level + _ROUNDING

    def sets(self, level: float) -> Tensor:
        """``[Q, way]`` bool, the classes in the prediction set of coverage ``level``."""
        return self.labels > 1 - level + _ROUNDING


def leave_one_out(
    head: Head,
    support: Tensor,
    target: Tensor,
    query: Tensor,
    way: int,
    *,
    base_mean: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> PValues:
    r"""P-values of queries by leave-one-out conformal prediction, the classification form of the jackknife+.

    For every support image i the head is fitted on the S - 1 others, and scores image i and all queries. The S heads
    are episodes of a few calls. With :math:`A_i` the strangeness of image i under its head, and :math:`A_{-i}(x)` that
    of the query x under the same head,

    .. math::
        p(x) = \frac{1 + \#\{i : A_i \ge A_{-i}(x)\}}{S + 1}.

    For ``known`` the strangeness is minus the largest score of the head: how far the image is from the class that is
    nearest to it. For ``labels`` it is minus the log-probability of a class, for support images of their own.

    Where queries and support images are drawn alike (exchangeable), :math:`P(p \le \alpha) \le 2 \alpha` for a query of
    a known class, whatever head and network; mostly it is close to :math:`\alpha`. That is an average over
    classes and over draws of the support set, and no promise for a single class or support set, and it says nothing of
    how many queries of other classes have small p-values. Support sets with the same number of images a class are not
    drawn quite like queries: the class of image i has an image less under its head, so that p-values are a little
    larger, and fewer known images rejected, the more the fewer images a class has. They are larger too for heads that
    differ much by what is random in them, such as fine-tuning with few steps. Scores that are sums over the images of a
    class are taken as shares of their means, lest the class of image i be always behind.

    Args:
        head: fitted S times, on vectors or maps; what is random in it is drawn by ``seed``.
        support: ``[S, D]`` features, or maps ``[S, N, C]``.
        target: ``[S]`` int64 in [0, way); every class at least twice.
        query: ``[Q, D]``, or maps ``[Q, N, C]`` that ``condense_queries`` may have been applied to.
        way: number of classes.
        base_mean: ``[D]``, for heads that need it.
        temperature: divides the logits for ``labels``.
        seed: the same for the same p-values.

    Raises:
        ValueError: a class with one image, besides the errors of a call of the head.

    Reference:
        Barber et al., Predictive Inference with the Jackknife+, Annals of Statistics 2021, Theorem 1; Romano et al.,
        Classification with Valid and Adaptive Coverage, NeurIPS 2020, section 2.3; Vovk, Cross-conformal Predictors,
        Annals of Mathematics and Artificial Intelligence 2015. The largest score tells unknown classes in Hendrycks et
        al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022.

    Example:
        >>> from fewshot_ext.heads import ProtoNet
        >>> support, target = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> result = leave_one_out(ProtoNet(), support, target, torch.tensor([[0.5], [30.0]]), way=2)
        >>> result.known, result.sets(0.75)
        (tensor([1.0000, 0.2000], dtype=torch.float64), tensor([[ True, False],
                [False,  True]]))
    """
    images = len(support)
    check_leaving_one_out(dict(enumerate(target.bincount(minlength=way).tolist())))
    left_out = head.condense_queries(support) if head.takes_maps else support
    everyone = torch.arange(images, device=support.device)
    others = everyone.expand(images, -1)[~torch.eye(images, dtype=torch.bool, device=support.device)]
    known = query.new_zeros(len(query), dtype=torch.int64)
    labels = query.new_zeros(len(query), way, dtype=torch.int64)
    # Whatever the queries, the same heads are fitted together: what is drawn at random depends on it.
    heads_at_once = max(1, _BYTES_AT_ONCE // max(1, support.nbytes))
    for own, rest in zip(
        everyone.split(heads_at_once), others.view(images, images - 1).split(heads_at_once), strict=True
    ):
        fitted, fitted_target = support[rest], target[rest]
        if head.takes_maps:
            fitted, fitted_target = head.condense(fitted, fitted_target, way, generator=_generator(seed))
        queries_at_once = max(1, _BYTES_AT_ONCE // max(1, len(own) * query[:1].nbytes))
        for start in range(0, len(query), queries_at_once):
            part = query[start : start + queries_at_once]
            scores = head(
                fitted,
                fitted_target,
                torch.cat([left_out[own].unsqueeze(1), part.expand(len(own), *part.shape)], 1),
                way,
                base_mean=base_mean,
                generator=_generator(seed),
            ).double()
            if head.sums_images:
                counts = F.one_hot(fitted_target, way).sum(1, keepdim=True)
                scores = (scores - counts.log()).log_softmax(-1)
            nearest = scores.amax(-1)  # [heads, 1 + queries]
            logarithms = (scores * (head.scale / temperature)).log_softmax(-1)
            true = logarithms[:, 0].gather(-1, target[own].unsqueeze(-1))
            known[start : start + len(part)] += (nearest[:, 1:] >= nearest[:, :1]).sum(0)
            labels[start : start + len(part)] += (logarithms[:, 1:] >= true.unsqueeze(-1)).sum(0)
    return PValues(*((1 + count.double().cpu()) / (images + 1) for count in (known, labels)))


def check_leaving_one_out(counts: Mapping[Hashable, int]) -> None:
    """Raises ValueError where a class has a single image: without it nothing would be known of the class.

    Args:
        counts: images by their class.

    Example:
        >>> check_leaving_one_out({"cat": 2, "dog": 1})
        Traceback (most recent call last):
        ValueError: support: expected at least 2 images of every class, because each is left out in turn, got 1 of 'dog'
    """
    for label, count in counts.items():
        if count < 2:
            raise ValueError(
                "support: expected at least 2 images of every class, because each is left out in turn, "
                f"got {count} of {label!r}"
            )


def check_reject(level: object, images: int, name: str = "reject") -> float:
    """The level, which must be in (0, 1) and not below the least p-value.

    Args:
        level: the largest share of known images to reject.
        images: in the support set.
        name: of the argument.

    Example:
        >>> check_reject(0.01, 25)
        Traceback (most recent call last):
        ValueError: reject: expected at least 1/26 = 0.03846, the finest level of 25 support images, got 0.01
    """
    number = check_number(name, level)
    if not 0 < number < 1:
        raise ValueError(f"{name}: expected a number in (0, 1), got {level}")
    least = 1 / (images + 1)
    if number < least - _ROUNDING:
        raise ValueError(
            f"{name}: expected at least 1/{images + 1} = {least:.4g}, the finest level of {images} support images, "
            f"got {level}"
        )
    return number


def check_coverage(level: object, images: int) -> float:
    """The level of prediction sets, which must be in (0, 1) and leave room for one p-value.

    Example:
        >>> check_coverage(0.99, 25)
        Traceback (most recent call last):
        ValueError: level: expected at most 25/26 = 0.9615, beyond which sets from 25 support images have all classes, \
got 0.99
    """
    number = check_number("level", level)
    if not 0 < number < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    most = images / (images + 1)
    if number > most + _ROUNDING:
        raise ValueError(
            f"level: expected at most {images}/{images + 1} = {most:.4g}, beyond which sets from {images} support "
            f"images have all classes, got {level}"
        )
    return number


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
