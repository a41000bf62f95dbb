"""DropBlock: dropout for feature maps, in square blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_ext._validation import check_count, check_fraction

# The official implementations of the few-shot literature reach the full rate after 20 epochs of 2,000 steps.
RAMP_STEPS = 40_000


class DropBlock(nn.Module):
    """Drops square blocks of each channel's map in training mode, and scales what is kept to the old mean.

    Blocks start only where they fit as a whole. The rate of block starts, gamma = rate / block_size^2 * H W / ((H -
    block_size + 1) (W - block_size + 1)), is the paper's eq. 1. In evaluation mode, and at rate 0, it is the identity.

    Args:
        rate: share of the activations to drop once the ramp is over, in [0, 1). Blocks overlap, so the share is a
            little smaller.
        block_size: side of a block, cut to the map's own side where the map is smaller.
        ramp_steps: the rate grows from 0 in a line over this many forward passes in training mode; 0 for none.

    Attributes:
        steps: int64 buffer, passes so far, so that a run that goes on from a checkpoint goes on in the ramp.

    Shape:
        ``[N, C, H, W]`` -> the same, of any floating dtype.

    Raises:
        ValueError: a value out of range.

    Reference:
        Ghiasi et al., DropBlock: A Regularization Method for Convolutional Networks, NeurIPS 2018; the ramp is that of
        Lee et al., Meta-Learning with Differentiable Convex Optimization, CVPR 2019.

    Example:
        >>> drop = DropBlock(0.5, block_size=2, ramp_steps=0)
        >>> images = torch.ones(1, 1, 4, 4)
        >>> torch.equal(drop.eval()(images), images)
        True
    """

    steps: Tensor

    def __init__(self, rate: float, block_size: int = 5, ramp_steps: int = RAMP_STEPS) -> None:
        super().__init__()
        check_fraction("rate", rate)
        check_count("block_size", block_size, 1)
        check_count("ramp_steps", ramp_steps, 0)
        self.rate, self.block_size, self.ramp_steps = rate, block_size, ramp_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return features
        height, width = features.shape[2:]
        block_height, block_width = min(self.block_size, height), min(self.block_size, width)
        starts = height - block_height + 1, width - block_width + 1
        gamma = self._current_rate() * (height * width / (block_height * block_width * starts[0] * starts[1]))
        dropped = (torch.rand((*features.shape[:2], *starts), device=features.device) < gamma).to(features.dtype)
        # A position is dropped where one of the block_height x block_width starts before it is. The maximum over a
        # square is that over its rows and then its columns, at a fraction of the comparisons.
        dropped = F.pad(dropped, (block_width - 1, block_width - 1, block_height - 1, block_height - 1))
        dropped = F.max_pool2d(F.max_pool2d(dropped, (1, block_width), stride=1), (block_height, 1), stride=1)
        kept = 1 - dropped
        share = kept.mean(dtype=torch.float32).clamp(min=1 / kept.numel())
        return features * kept / share.to(features.dtype)

    def _current_rate(self) -> Tensor | float:
        if not self.ramp_steps:
            return self.rate
        rate = (self.steps / self.ramp_steps).clamp(max=1) * self.rate
        self.steps += 1
        return rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}, block_size={self.block_size}, ramp_steps={self.ramp_steps}"


def stage_dropout(stage: int, rate: float, block_size: int, ramp_steps: int) -> nn.Module:
    """What follows a residual block: dropout in the first two of the four stages, DropBlock in the last two.

    The official implementations of the negative-margin paper and of MetaOptNet share this layout and one rate.
    """
    if rate == 0:
        return nn.Identity()
    return nn.Dropout(rate) if stage < 2 else DropBlock(rate, block_size, ramp_steps)
