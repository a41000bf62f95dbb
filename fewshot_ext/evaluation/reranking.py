"""Retrieval in two stages: candidates by a global feature, put in order by matching their regions."""

import torch
from torch import Tensor

from fewshot_ext._checks import check_positive
from fewshot_ext.models import emd_logits
from fewshot_ext.models.matching import Weighting, check_finite_maps, check_floating

_BYTES_AT_ONCE = 2**28


@torch.no_grad()
def rerank(
    query_maps: Tensor,
    gallery_maps: Tensor,
    candidates: Tensor,
    *,
    weighting: Weighting = "cross_reference",
    bytes_at_once: int = _BYTES_AT_ONCE,
) -> Tensor:
    """Puts the candidates of each query in the order of their Earth Mover's Distance to it, nearest first.

    Args:
        query_maps: ``[Q, N, C]`` local features.
        gallery_maps: ``[G, M, C]``, in the dtype and on the device of ``query_maps``.
        candidates: ``[Q, K]`` int64 indices into the gallery, such as the nearest K by a global feature.
        weighting: as in ``fewshot_ext.models.emd_logits``.
        bytes_at_once: bound on the maps of candidates that are gathered at a time.

    Returns:
        ``[Q, K]`` int64: the same gallery indices, nearest first. Equal distances stay in the order in which
        they came, but rounding may tell two copies of an image apart.

    Raises:
        TypeError: maps that are not floating-point, or candidates that are not an int64 tensor.
        ValueError: shapes or devices that do not fit each other, no regions, an index outside of the gallery, maps
            that are not finite, or an option out of range.

    Reference:
        Zhang et al., DeepEMD: Differentiable Earth Mover's Distance for Few-Shot Learning, TPAMI 2022, on image
        retrieval.

    Example:
        >>> gallery = torch.rand(6, 9, 16)
        >>> rerank(gallery[:2], gallery, torch.tensor([[3, 2, 0], [1, 4, 5]]))[:, 0]
        tensor([0, 1])
    """
    check_positive("bytes_at_once", bytes_at_once)
    check_floating(query_maps=query_maps, gallery_maps=gallery_maps)
    for name, maps in (("query_maps", query_maps), ("gallery_maps", gallery_maps)):
        if maps.dim() != 3 or 0 in maps.shape[1:]:
            raise ValueError(f"{name} must be [images, N, C], N and C at least 1, got {list(maps.shape)}")
    if gallery_maps.shape[2] != query_maps.shape[2]:
        raise ValueError(
            f"gallery_maps must have the {query_maps.shape[2]} channels of query_maps, got {gallery_maps.shape[2]}"
        )
    if gallery_maps.dtype != query_maps.dtype:
        raise TypeError(f"gallery_maps must have the dtype of query_maps, {query_maps.dtype}, got {gallery_maps.dtype}")
    if not isinstance(candidates, Tensor) or candidates.dtype != torch.int64:
        came = candidates.dtype if isinstance(candidates, Tensor) else type(candidates).__name__
        raise TypeError(f"candidates must be an int64 tensor, got {came}")
    if candidates.dim() != 2 or len(candidates) != len(query_maps):
        raise ValueError(f"candidates must be [{len(query_maps)}, K], got {list(candidates.shape)}")
    for name, value in (("gallery_maps", gallery_maps), ("candidates", candidates)):
        if value.device != query_maps.device:
            raise ValueError(f"{name} must be on the device of query_maps, {query_maps.device}, got {value.device}")
    if candidates.numel() == 0:
        return candidates.clone()
    low, high = torch.stack(candidates.aminmax()).tolist()
    if low < 0 or high >= len(gallery_maps):
        raise ValueError(f"candidates must lie in [0, {len(gallery_maps)}), got {low} to {high}")
    check_finite_maps(query_maps=query_maps, gallery_maps=gallery_maps)

    queries = max(1, int(bytes_at_once // (gallery_maps[0].nbytes * candidates.shape[1])))
    order = [
        emd_logits(maps.unsqueeze(1), gallery_maps[chosen], weighting=weighting, bytes_at_once=bytes_at_once)
        .squeeze(1)
        .argsort(dim=-1, descending=True, stable=True)
        for maps, chosen in zip(query_maps.split(queries), candidates.split(queries), strict=True)
    ]
    return candidates.gather(1, torch.cat(order))
