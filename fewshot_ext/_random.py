"""Seeds for the parts of a run, each independent of the others and the same in every process."""

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """A 63-bit seed for the part of a run that ``key`` names, such as (seed, epoch).

    Sums would not do: seed 1 would repeat what seed 0 does one epoch later.

    Args:
        key: integers, none negative.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derive_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded with ``derive_seed(*key)``."""
    return torch.Generator().manual_seed(derive_seed(*key))
