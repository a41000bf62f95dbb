"""Which base classes the images of novel classes fall into: equation 5 and the proposition of section 3.4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision
from fewshot_ext._validation import check_positive
from fewshot_ext.experiments.measures.discriminability import count_labels


@full_precision()
def base_class_probabilities(similarities: Tensor, labels: Tensor, scale: float) -> Tensor:
    """P_jk: probability that an image of class j is classified as base class k.

    Args:
        similarities: ``[N, B]`` float32 or float64, of each image to the B classifier vectors of the pre-training,
            without margin and scale.
        labels: ``[N]`` int64, classes 0 .. C - 1 (novel ones in the paper), each with at least one image.
        scale: beta, the scale of the pre-training's softmax.

    Returns:
        ``[C, B]``; every row sums to 1. Gradients flow.

    Raises:
        TypeError: an argument that is not a tensor of the dtype above.
        ValueError: shapes that do not fit each other, a class without images, or a scale that is not positive.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 5.

    Example:
        >>> base_class_probabilities(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]), scale=1.0)
        tensor([[0.5000, 0.5000]])
    """
    if not isinstance(similarities, Tensor) or similarities.dtype not in (torch.float32, torch.float64):
        came = similarities.dtype if isinstance(similarities, Tensor) else type(similarities).__name__
        raise TypeError(f"similarities: expected a float32 or float64 tensor, got {came}")
    if similarities.dim() != 2 or not similarities.numel():
        raise ValueError(f"similarities: expected shape [N, B] with N and B at least 1, got {list(similarities.shape)}")
    check_positive("scale", scale)
    counts = count_labels(labels, len(similarities))
    sums = similarities.new_zeros(len(counts), similarities.shape[1])
    return sums.index_add(0, labels, torch.softmax(scale * similarities, 1)) / counts.unsqueeze(1)


@full_precision()
def same_class_probability(probabilities: Tensor) -> Tensor:
    """P_j^s: probability that two images of class j are classified as the same base class. Its mean is P^s.

    Args:
        probabilities: ``[C, B]``, as ``base_class_probabilities`` gives them.

    Returns:
        ``[C]``, each between 1 / B and 1.

    Raises:
        ValueError: another number of dimensions.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, section 3.4.

    Example:
        >>> same_class_probability(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.5000, 1.0000])
    """
    if probabilities.dim() != 2:
        raise ValueError(f"probabilities: expected shape [C, B], got {list(probabilities.shape)}")
    return probabilities.square().sum(1)


@dataclass(frozen=True)
class MarginMeasures:
    """What the proposition speaks of, measured at one margin.

    Args:
        margin: m.
        base_inter, base_intra: D_inter and D_intra of the base classes.
        novel_inter, novel_intra: those of the novel classes.
        same_class: P^s.
    """

    margin: float
    base_inter: float
    base_intra: float
    novel_inter: float
    novel_intra: float
    same_class: float

    @property
    def base_ratio(self) -> float:
        """phi of the base classes."""
        return self.base_inter / self.base_intra

    @property
    def novel_ratio(self) -> float:
        """phi of the novel classes."""
        return self.novel_inter / self.novel_intra

    @property
    def inter_ratio(self) -> float:
        """psi = D_inter(novel) / D_inter(base)."""
        return self.novel_inter / self.base_inter

    @property
    def modeled_novel_intra(self) -> float:
        """P^s D_intra(base) + (1 - P^s) D_inter(base): what the proof takes D_intra of the novel classes to be."""
        return self.same_class * self.base_intra + (1 - self.same_class) * self.base_inter


@dataclass(frozen=True)
class PropositionCheck:
    """The proposition of section 3.4 for two margins.

    Attributes:
        r: 1 / phi of the base classes falls by r for each unit of margin; the premise is r > 0.
        t: psi falls by t for each unit of margin; the premise is t > 0.
        bound: P^s must stay below it.
        same_class: the larger P^s of the two margins.
        premises: r and t are positive and P^s lies between 0 and the bound.
        conclusion: phi of the novel classes is smaller at the larger margin.
    """

    r: float
    t: float
    bound: float
    same_class: float
    premises: bool
    conclusion: bool


def check_proposition(smaller: MarginMeasures, larger: MarginMeasures) -> PropositionCheck:
    """Whether the premises of the proposition of section 3.4 hold for two margins, and whether its conclusion does.

    The paper: if phi of the base classes rises with the margin, 1 / phi(m1) - 1 / phi(m2) = r (m2 - m1), and psi falls,
    psi(m1) - psi(m2) = t (m2 - m1), then P^s < t / (t (1 - 1 / phi(m1)) + r psi(m1)) makes phi of the novel classes
    fall. Its proof puts ``modeled_novel_intra`` for D_intra of the novel classes, with one P^s for both margins; how
    far that is from what was measured decides what the premises are worth. P^s is taken as the larger of the two.

    Args:
        smaller, larger: what was measured at m1 < m2.

    Raises:
        ValueError: the margins are not in rising order.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, section 3.4, eq. 6.

    Example:
        >>> loose = MarginMeasures(-0.3, 1.0, 0.4, novel_inter=0.5, novel_intra=0.8, same_class=0.2)
        >>> tight = MarginMeasures(0.3, 1.5, 0.2, novel_inter=0.5, novel_intra=1.3, same_class=0.2)
        >>> found = check_proposition(loose, tight)
        >>> round(found.bound, 3), found.premises, found.conclusion
        (0.714, True, True)
    """
    step = larger.margin - smaller.margin
    if step <= 0:
        raise ValueError(f"margins: expected to rise from smaller to larger, got {smaller.margin} and {larger.margin}")
    r = (1 / smaller.base_ratio - 1 / larger.base_ratio) / step
    t = (smaller.inter_ratio - larger.inter_ratio) / step
    denominator = t * (1 - 1 / smaller.base_ratio) + r * smaller.inter_ratio
    bound = t / denominator if denominator else float("nan")
    same_class = max(smaller.same_class, larger.same_class)
    return PropositionCheck(
        r=r,
        t=t,
        bound=bound,
        same_class=same_class,
        premises=r > 0 and t > 0 and 0 < same_class < bound,
        conclusion=larger.novel_ratio < smaller.novel_ratio,
    )
