"""Whether probabilities are those of being right, and the temperature that makes them so."""

import math

import torch
from torch import Tensor

from fewshot_ext.evaluation.protocol import mean_and_interval

BINS = 15
TEMPERATURES = (1e-3, 1e3)
"""The least and the largest temperature that ``fit_temperature`` gives."""
_HALVINGS = 50


def calibration_errors(probabilities: Tensor, target: Tensor, bins: int = BINS) -> Tensor:
    """What each episode adds to the expected calibration error (ECE), whose value is the mean.

    The predictions of all episodes together are put in bins of equal width by their confidence. In each bin the mean
    confidence is held against the accuracy; the ECE is the mean of the gaps, weighted with the predictions in the bin.
    A prediction in an overconfident bin adds its confidence, less 1 where it is right; one in an underconfident bin
    takes that away. So the ECE is a mean over episodes, and ``mean_and_interval`` gives its interval to first order:
    that the sign of a bin's gap is a matter of chance as well is not in it.

    Args:
        probabilities: ``[E, Q, way]`` floats in [0, 1], of Q queries of each of E episodes.
        target: ``[Q]`` or ``[E, Q]`` int64, the true classes.
        bins: how many there are.

    Returns:
        ``[E]`` float64; single episodes may be below 0.

    Reference:
        Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015; Guo et al., On
        Calibration of Modern Neural Networks, ICML 2017, eq. 3, with their 15 bins.

    Example:
        >>> sure = torch.tensor([[[0.9, 0.1], [0.9, 0.1]]])
        >>> calibration_errors(sure, torch.tensor([0, 1]))  # 90 % sure, and right half the time
        tensor([0.4000], dtype=torch.float64)
    """
    confidence, predicted = probabilities.double().max(-1)
    gaps = confidence - (predicted == target).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    signs = gaps.new_zeros(bins).index_add(0, bin_of.flatten(), gaps.flatten()).sign()
    return (signs[bin_of] * gaps).mean(1)


def log_losses(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean negative log-likelihood of each episode's queries, in nats.

    Args:
        logits: ``[E, Q, way]``, the scores of a head times its ``scale``.
        target: ``[Q]`` int64, the true classes.
        temperature: divides the logits.

    Returns:
        ``[E]`` float64.

    Example:
        >>> log_losses(torch.zeros(1, 1, 2), torch.tensor([0])).exp()
        tensor([2.], dtype=torch.float64)
    """
    logarithms = (logits.double() / temperature).log_softmax(-1)
    return -logarithms.gather(-1, target.expand(logits.shape[:2]).unsqueeze(-1)).squeeze(-1).mean(1)


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T for which ``softmax(logits / T)`` has the least negative log-likelihood.

    The loss is convex in 1 / T, so that halving an interval by the sign of its derivative finds the one minimum. Where
    there is none, because every query is right or the logits tell nothing, the answer is a bound of ``TEMPERATURES``.

    Args:
        logits: ``[..., way]`` floats, the scores of a head times its ``scale``.
        target: ``[...]`` int64, or what broadcasts to it, the true classes.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))  # right three times of four
        >>> torch.softmax(logits[0] / temperature, -1)
        tensor([0.7500, 0.2500])
    """
    logits = logits.double()
    true = logits.gather(-1, target.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = (torch.softmax(logits / math.exp(middle), -1) * logits).sum(-1)
        # The derivative of the loss in 1 / T: above 0 where the predictions are too sure.
        low, high = (middle, high) if (expected - true).mean() > 0 else (low, middle)
    return math.exp((low + high) / 2)


def calibration_measures(logits: Tensor, target: Tensor, temperature: float) -> dict[str, tuple[float, float]]:
    """The expected calibration error in percent and the negative log-likelihood in nats, each with its interval.

    Args:
        logits, target, temperature: as in ``log_losses``.

    Example:
        >>> calibration_measures(torch.zeros(1, 2, 2), torch.tensor([0, 1]), temperature=1.0)["ece"]
        (0.0, 0.0)
    """
    probabilities = torch.softmax(logits.double() / temperature, -1)
    return {
        "ece": mean_and_interval(100 * calibration_errors(probabilities, target)),
        "nll": mean_and_interval(log_losses(logits, target, temperature)),
    }
