"""Collectives of the divided losses: rows of uneven batches, and agreement of the ranks before any work."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns of the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Batches:
    """The batch of every rank, which may differ in size, as parts of one.

    Args:
        sizes: rows of each rank.
        group: the ranks.
    """

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup) -> None:
        self.sizes, self.group = list(sizes), group
        self.total, self.widest = sum(sizes), max(sizes)
        # Collectives exchange tensors of one size, so that uneven batches travel with padding.
        self._even = min(sizes) == self.widest
        rank = dist.get_rank(group)
        first = sum(sizes[:rank])
        self.own = slice(first, first + sizes[rank])
        self._own_size = sizes[rank]

    def gather(self, rows: Tensor) -> Tensor:
        """``[N_r, ...]`` of each rank -> ``[N, ...]``, in the order of the ranks, on every rank."""
        if self.widest == 0:
            return rows
        if not self._even:
            padding = rows.new_zeros(self.widest - len(rows), *rows.shape[1:])
            rows = torch.cat([rows, padding])
        gathered = rows.new_empty(len(self.sizes) * self.widest, *rows.shape[1:])
        _all_gather(gathered, rows.contiguous(), group=self.group)
        if self._even:
            return gathered
        return torch.cat([part[:size] for part, size in zip(gathered.split(self.widest), self.sizes, strict=True)])

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """A term ``[N, ...]`` of each rank -> the sum of all ranks', ``[N_r, ...]``, of the rank's own rows."""
        if self.widest == 0:
            return rows
        if not self._even:
            padded = rows.new_zeros(len(self.sizes), self.widest, *rows.shape[1:])
            for part, of_rank, size in zip(padded, rows.split(self.sizes), self.sizes, strict=True):
                part[:size] = of_rank
            rows = padded.flatten(0, 1)
        own = rows.new_empty(self.widest, *rows.shape[1:])
        _reduce_scatter(own, rows.contiguous(), group=self.group)
        return own[: self._own_size]


def agree_once(describe: Callable[[], dict[str, object]], group: dist.ProcessGroup) -> dict[str, object]:
    """What ``describe`` says, once all ranks are known to say the same. Waits for all ranks.

    Raises:
        TypeError or ValueError: on every rank, what ``describe`` raises on one, or that two of them differ.
    """
    facts, error = {}, None
    try:
        facts = describe()
    except (TypeError, ValueError) as raised:
        error = raised
    reports: list[tuple[dict[str, object], Exception | None]] = [({}, None)] * dist.get_world_size(group)
    dist.all_gather_object(reports, (facts, error), group=group)
    _raise_first([error for _, error in reports])
    _refuse_differences([facts for facts, _ in reports])
    return facts


class StepAgreement:
    """The same for every step: one small tensor travels, and objects only where something is wrong.

    Args:
        codes: the name of each fact -> the values that it can have.
        group: the ranks.
        device: where the group exchanges tensors.
    """

    def __init__(self, codes: dict[str, Sequence[object]], group: dist.ProcessGroup, device: torch.device) -> None:
        self.codes, self.group, self.device = codes, group, device

    def reach(self, size: int, facts: dict[str, object], error: Exception | None) -> list[int]:
        """The ``size`` of every rank, once all have said the same ``facts`` and none has an ``error``.

        Raises:
            TypeError or ValueError: on every rank, the error of one, or that two of them differ.
        """
        coded = [self.codes[name].index(value) for name, value in facts.items()] or [0] * len(self.codes)
        own = torch.tensor([error is not None, size, *coded], dtype=torch.int64, device=self.device)
        table = own.new_empty(dist.get_world_size(self.group) * len(own))
        _all_gather(table, own, group=self.group)
        rows = table.view(-1, len(own)).tolist()
        if any(failed for failed, *_ in rows):
            errors: list[Exception | None] = [None] * len(rows)
            dist.all_gather_object(errors, error, group=self.group)
            _raise_first(errors)
        _refuse_differences(
            [
                {name: values[code] for (name, values), code in zip(self.codes.items(), row, strict=True)}
                for _, _, *row in rows
            ]
        )
        return [size for _, size, *_ in rows]


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")


def _refuse_differences(facts: Sequence[dict[str, object]]) -> None:
    for name, expected in facts[0].items():
        for rank, of_rank in enumerate(facts):
            if of_rank[name] != expected:
                raise ValueError(
                    f"{name}: expected the same on every rank, got {expected} on rank 0 and {of_rank[name]} on "
                    f"rank {rank}"
                )
