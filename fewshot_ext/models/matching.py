"""Images matched region by region: the Earth Mover's Distance between sets of local features, as DeepEMD has it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision, normalize
from fewshot_ext._validation import check_choice, check_count, check_like, check_positive
from fewshot_ext.ops import emd

TEMPERATURE = 12.5  # of the official implementation
WEIGHT_FLOOR = 1e-3  # likewise: every region takes part, however little it has to do with the other image
SMALLEST_LENGTH = 1e-12  # as in torch.nn.functional.normalize
Weighting = Literal["cross_reference", "uniform"]
_BYTES_AT_ONCE = 2**28
# Similarities as the product leaves them, in the order of the problems, as costs, and the flow.
_COPIES_OF_A_PROBLEM = 4


class Match(NamedTuple):
    """What :func:`match_flows` returns; all three are in units of mass, N of them on each side."""

    flow: Tensor  # [..., N, M]
    query_weight: Tensor  # [..., N]
    support_weight: Tensor  # [..., M]


torch.serialization.add_safe_globals([Match])  # so that torch.load reads a saved one


def cross_reference_weights(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    r"""How much each region of an image has to do with the other image, for every pair of two groups of images.

    .. math:: s_i = \max\left(u_i^T \frac{1}{M} \sum_j v_j, 0\right) + 10^{-3}

    for the regions u of one image and v of the other, and the same the other way round; then both sides are scaled
    to a total mass of N. As in the official implementation, the features are taken as they come, before they are
    centered; the constant is from there too.

    Args:
        query: ``[E, Q, N, C]``, N regions an image.
        support: ``[E, P, M, C]``.

    Returns:
        ``[E, Q, P, N]`` and ``[E, Q, P, M]``, positive, each with sum N over its last dimension; gradients reach both
        arguments.

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: shapes or devices that do not fit each other, or no regions.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020, on the cross-reference mechanism.

    Example:
        >>> query = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> support = torch.tensor([[[[2.0, 0.0], [4.0, 0.0]]]])
        >>> cross_reference_weights(query, support)[0]
        tensor([[[[1.9993e+00, 6.6622e-04]]]])
    """
    query, support = checked_maps(query=query, support=support)
    with full_precision():  # in half types the masses of the two sides would be rounded apart
        query_relevance = torch.einsum("eqnc,epc->eqpn", query, support.mean(2))
        support_relevance = torch.einsum("epmc,eqc->eqpm", support, query.mean(2))
    mass = query.shape[2]
    return weights_of(query_relevance, mass), weights_of(support_relevance, mass)


def emd_logits(
    query: Tensor,
    support: Tensor,
    *,
    temperature: float = TEMPERATURE,
    weighting: Weighting = "cross_reference",
    detach_weights: bool = False,
    bytes_at_once: int = _BYTES_AT_ONCE,
) -> Tensor:
    r"""Scores every query image of an episode against every support image, or class prototype, by optimal matching.

    .. math:: \text{logit} = \frac{T}{N} \sum_{ij} F_{ij} S_{ij} = \frac{T}{N} (N - \text{EMD}(1 - S, s, d))

    with S the cosines of features centered over the channels, and F the flow of least cost 1 - S between weights s and
    d of total mass N. The two sides of the equation are equal in value, and the right one carries the whole gradient:
    to the features through the flow, and to the weights through the duals.

    All pairs of all episodes are one batch of :func:`fewshot_ext.emd`, cut into several only where it would take more
    than ``bytes_at_once``.

    Args:
        query: ``[E, Q, N, C]``, N local features an image; any floating dtype, half types are computed in float32.
        support: ``[E, P, M, C]``, in the dtype and on the device of ``query``; M may differ from N.
        temperature: T.
        weighting: "cross_reference" (see :func:`cross_reference_weights`), or "uniform" for equal weights.
        detach_weights: stop the gradient through the weights, as the official implementation does wherever it solves
            with OpenCV: by default, and always in evaluation. Its quadratic solver, and the paper, let it pass.
        bytes_at_once: bound on the costs and flows that exist at a time; a graph for gradients keeps the flows of all.

    Returns:
        ``[E, Q, P]`` logits, float64 for float64 features and float32 otherwise, at most ``temperature``.

    Raises:
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.
        ValueError: shapes or devices that do not fit each other, no regions, features that are not finite (on a GPU
            the logits are NaN instead, because a look would make the host wait) or whose products overflow, or an
            option out of range.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).

    Example:
        >>> image = torch.rand(1, 1, 25, 64)
        >>> other = torch.rand(1, 1, 25, 64)
        >>> logits = emd_logits(image, torch.cat([image.flip(2), other], 1))
        >>> bool(logits[0, 0, 0] > logits[0, 0, 1]), round(logits[0, 0, 0].item(), 3)
        (True, 12.5)
    """
    check_positive("temperature", temperature)
    bytes_at_once = check_count("bytes_at_once", bytes_at_once, 1)
    check_choice("weighting", weighting, "cross_reference", "uniform")
    query, support = checked_maps(query=query, support=support)
    mass = query.shape[2]
    bytes_a_query = _COPIES_OF_A_PROBLEM * query.element_size() * mass * support.shape[1] * support.shape[2]
    queries = max(1, bytes_at_once // max(1, bytes_a_query))
    episodes = max(1, queries // max(1, query.shape[1]))
    values = [
        torch.cat([_solve(part, group, weighting, detach_weights).value for part in images.split(queries, 1)], 1)
        for images, group in zip(query.split(episodes), support.split(episodes), strict=True)
    ]
    return temperature * (1 - torch.cat(values) / mass)


def match_flows(query: Tensor, support: Tensor, *, weighting: Weighting = "cross_reference") -> Match:
    """The flow between the regions of pairs of images, and the weights that it respects: what a picture shows.

    Args:
        query: ``[..., N, C]`` local features.
        support: ``[..., M, C]``, as many as queries.
        weighting: as in :func:`emd_logits`.

    Returns:
        A named tuple of ``flow`` ``[..., N, M]``, ``query_weight`` ``[..., N]`` and ``support_weight`` ``[..., M]``,
        each of total mass N, without gradients.

    Raises:
        As :func:`emd_logits`.

    Example:
        >>> image = torch.eye(3)
        >>> match_flows(image, image.flip(0)).flow
        tensor([[0., 0., 1.],
                [0., 1., 0.],
                [1., 0., 0.]])
    """
    check_choice("weighting", weighting, "cross_reference", "uniform")
    check_floating(query=query, support=support)
    for name, maps in (("query", query), ("support", support)):
        if maps.dim() < 2:
            raise ValueError(f"{name}: expected shape [..., N, C], got {list(maps.shape)}")
    batch = query.shape[:-2]
    if support.shape[:-2] != batch:
        raise ValueError(
            f"support: expected shape [..., M, C] with the batch {list(batch)} of query, got {list(support.shape)}"
        )
    query, support = (maps.detach().reshape(-1, 1, *maps.shape[-2:]) for maps in (query, support))
    solved = _solve(*checked_maps(query=query, support=support), weighting, detach_weights=True)
    parts = (solved.flow, solved.query_weight, solved.support_weight)
    return Match(*(part.reshape(*batch, *part.shape[3:]) for part in parts))


def weights_of(relevance: Tensor, mass: int) -> Tensor:
    """Weights of total ``mass`` from relevances of either sign, over the last dimension."""
    return scaled_to(relevance.relu() + WEIGHT_FLOOR, mass)


def scaled_to(weights: Tensor, mass: int) -> Tensor:
    """Weights of total ``mass`` over the last dimension."""
    return weights * (mass / weights.sum(-1, keepdim=True))


def cosines(query: Tensor, support: Tensor) -> Tensor:
    """The similarities S of all pairs, ``[E, Q, P, N, M]``."""
    centered, units = (maps - maps.mean(-1, keepdim=True) for maps in (query, support))
    length = torch.linalg.vector_norm(centered, dim=-1).clamp_min(SMALLEST_LENGTH)
    length = length.masked_fill(length.isinf(), torch.nan)  # too long for their squares: no cosine, rather than 0
    # Queries are many and long: dividing their products is cheaper than dividing them.
    return torch.einsum("eqnc,epmc->eqpnm", centered, normalize(units)) / length[:, :, None, :, None]


def check_floating(**named: object) -> None:
    """Raises TypeError unless every argument is a floating-point tensor."""
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {came}")


def check_finite_maps(**named: Tensor) -> None:
    """Raises ValueError unless all local features are finite."""
    for name, maps in named.items():
        # A sum is one pass without a copy, several times faster; where it overflows it tells nothing.
        accumulate = torch.promote_types(maps.dtype, torch.float32)
        if not maps.detach().sum(dtype=accumulate).isfinite() and not maps.isfinite().all():
            raise ValueError(f"{name}: expected finite entries, got NaN or infinity")


def checked_maps(**named: Tensor) -> tuple[Tensor, Tensor]:
    """Two groups of feature maps ``[E, images, N, C]`` that can be compared, in float32 or float64."""
    check_floating(**named)
    for name, maps in named.items():
        if maps.dim() != 4:
            raise ValueError(f"{name}: expected shape [E, images, N, C], got {list(maps.shape)}")
        if maps.shape[2] == 0 or maps.shape[3] == 0:
            raise ValueError(f"{name}: expected at least one region and one channel, got {list(maps.shape)}")
    (first_name, first), (second_name, second) = named.items()
    for axis, what in ((0, "episodes"), (3, "channels")):
        if first.shape[axis] != second.shape[axis]:
            raise ValueError(
                f"{second_name}: expected the {first.shape[axis]} {what} of {first_name}, got {second.shape[axis]}"
            )
    check_like(first_name, first, second_name, second)
    accumulate = torch.promote_types(first.dtype, torch.float32)
    return first.to(accumulate), second.to(accumulate)


class _Solved(NamedTuple):
    value: Tensor  # [E, Q, P]
    flow: Tensor  # [E, Q, P, N, M]
    query_weight: Tensor  # [E, Q, P, N]
    support_weight: Tensor  # [E, Q, P, M]


def _solve(query: Tensor, support: Tensor, weighting: Weighting, detach_weights: bool) -> _Solved:
    with full_precision():  # in half types the masses of the two sides would be rounded apart
        similarity = cosines(query, support)
        if weighting == "uniform":
            weights = (torch.ones_like(similarity[..., 0]), torch.ones_like(similarity[..., 0, :]))
            weights = tuple(scaled_to(weight, query.shape[2]) for weight in weights)
        else:
            weights = cross_reference_weights(query, support)
        if detach_weights:
            weights = tuple(weight.detach() for weight in weights)
        try:
            solved = emd(1 - similarity, *weights)
        except ValueError as error:
            check_finite_maps(query=query, support=support)
            if all(part.isfinite().all() for part in (similarity, *weights)):
                raise
            largest = max(maps.detach().abs().max().item() for maps in (query, support))
            raise ValueError(
                f"query and support: expected inner products that {query.dtype} holds, got entries of up to {largest:g}"
            ) from error
    return _Solved(solved.value, solved.flow, *weights)
