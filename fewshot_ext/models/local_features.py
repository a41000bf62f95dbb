"""Local features of images, the three ways of DeepEMD: positions of a feature map, crops on a grid, random crops."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_ext._random import derive_generator
from fewshot_ext._validation import check_at_least, check_count
from fewshot_ext.data import ImageInput
from fewshot_ext.data.resampling import resized_parts
from fewshot_ext.models.backbone import Backbone

# Of torchvision's RandomResizedCrop, which the official implementation draws its regions with.
_SMALLEST_AREA = 0.08
_LARGEST_ASPECT = 4 / 3
_ATTEMPTS = 10


class LocalFeatures(nn.Module, ABC):
    """A module from images ``[B, ...]`` to N local features each, ``[B, N, C]``, in the mode that its backbone is in.

    Args:
        backbone: offers ``feature_map``, images ``[B, ...]`` to ``[B, C, h, w]``.
        preprocessing: applied to the images before the backbone, such as ``fewshot_ext.data.ImageInput``; nothing where
            None. Of a trained network, ``network = fewshot_ext.models.load_network(path)``, the two are
            ``network.backbone`` and ``network.preprocessing``.

    Raises:
        TypeError: a backbone without ``feature_map``.
    """

    def __init__(self, backbone: Backbone | nn.Module, preprocessing: nn.Module | None = None) -> None:
        super().__init__()
        if not callable(getattr(backbone, "feature_map", None)):
            raise TypeError(f"backbone: expected a method feature_map, {type(backbone).__name__} has none")
        self.backbone = backbone
        self.preprocessing = nn.Identity() if preprocessing is None else preprocessing
        self.training = backbone.training  # what wraps a trained network is not about to train it

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images to their local features; see the class."""

    @abstractmethod
    def boxes(self, images: Tensor) -> Tensor:
        """Where the local features of images look: ``[B, N, 4]`` float64 boxes (left, top, right, bottom).

        They are in pixels of ``view``, and those of ``forward`` in evaluation; in training crops are drawn anew by
        every call.
        """

    def view(self, images: Tensor) -> Tensor:
        """What the regions are regions of, normalized: here the images behind the preprocessing."""
        return self.preprocessing(images)


class FCN(LocalFeatures):
    """Every position of the feature map is a region: 5 x 5 for a ResNet-12 on 84 x 84 pixels.

    Args:
        backbone, preprocessing: see :class:`LocalFeatures`.
        pyramid: sides of coarser grids that the map is pooled to beside it, such as (2, 3); their regions come first.

    Shape:
        ``[B, channels, H, W]`` -> ``[B, N, C]``, N = h w plus the squares of the pyramid's sides.

    Raises:
        TypeError: a backbone without ``feature_map``, or a side that is no integer.
        ValueError: a pyramid with a side below 1; in a call, a side above that of the feature map.

    Reference:
        Zhang et al., DeepEMD, CVPR 2020; the pyramid is that of the official implementation.

    Example:
        >>> from fewshot_ext.models import conv4
        >>> FCN(conv4(), pyramid=(2, 3))(torch.rand(2, 3, 84, 84)).shape
        torch.Size([2, 38, 64])
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        pyramid: Sequence[int] = (),
        *,
        preprocessing: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, preprocessing)
        self.pyramid = _checked_sides("pyramid", pyramid)

    def forward(self, images: Tensor) -> Tensor:
        feature_map = self.backbone.feature_map(self.preprocessing(images))
        height, width = feature_map.shape[2:]
        if max(self.pyramid, default=0) > min(height, width):
            raise ValueError(
                f"pyramid: expected sides of at most {min(height, width)}, for the feature map is {height} x {width}, "
                f"got {max(self.pyramid)}"
            )
        levels = [F.adaptive_avg_pool2d(feature_map, side) for side in self.pyramid]
        return torch.cat([level.flatten(2) for level in (*levels, feature_map)], 2).mT

    def boxes(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images[:1])
        cells = tuple(self.backbone.feature_map(pixels).shape[2:])
        boxes = [
            pooled_regions(parts, cells, tuple(pixels.shape[2:]))
            for parts in (*((side, side) for side in self.pyramid), cells)
        ]
        return torch.cat(boxes).expand(len(images), -1, -1)

    def extra_repr(self) -> str:
        return f"pyramid={self.pyramid}"


class _Crops(LocalFeatures):
    """Each region is a crop of the stored image, resized to the size that the backbone sees; its feature is the mean
    over the crop's map.

    An ``ImageInput`` resizes nothing before the crops are cut, as in the official implementation. Another
    preprocessing comes first, and the crops are resized to the size of what it makes.
    """

    def __init__(self, backbone: Backbone | nn.Module, horizontal_flip: bool, preprocessing: nn.Module | None) -> None:
        super().__init__(backbone, preprocessing)
        self.horizontal_flip = horizontal_flip

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.view(images)
        if pixels.dim() != 4 or not pixels.is_floating_point():
            raise TypeError(
                "images: expected floating-point [B, C, H, W], or a preprocessing that makes them so, "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        boxes, mirrored = self.draw(images, *pixels.shape[2:])
        side = self.preprocessing.image_size if isinstance(self.preprocessing, ImageInput) else None
        size = tuple(pixels.shape[2:]) if side is None else (side, side)
        crops = resized_parts(pixels, boxes, size, mirrored, alone=True)
        features = self.backbone.feature_map(crops.flatten(0, 1)).mean((2, 3))
        return features.unflatten(0, crops.shape[:2])

    def boxes(self, images: Tensor) -> Tensor:
        boxes, _ = self.draw(images, *self.view(images[:1]).shape[2:])
        return boxes.double()

    def view(self, images: Tensor) -> Tensor:
        """The stored images, in training augmented; behind a preprocessing that is no ``ImageInput``."""
        own = self.preprocessing
        return own.whole(images) if isinstance(own, ImageInput) else own(images)

    @abstractmethod
    def draw(self, images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The regions of images ``[B, ...]`` whose views are ``height`` x ``width``.

        Returns:
            Boxes ``[B, N, 4]`` int64, (left, top, right, bottom) in pixels, and whether each is mirrored, ``[B, N]``
            bool; both on the CPU.
        """


class Grid(_Crops):
    """The stored image cut into grids of several sizes; every cell, enlarged around its center, is a region.

    In training the enlargement is drawn for every image and grid, 1 + 2 U(0, 1), from torch's global generator.

    Args:
        backbone, preprocessing: see :class:`LocalFeatures`.
        grids: sides of the grids.
        ratio: side of a region in evaluation, in sides of a cell; what reaches over the image's edge is cut off.
        horizontal_flip: mirror half of the regions in training. Never for digits or letters.

    Shape:
        ``[B, channels, H, W]`` -> ``[B, N, C]``, N the sum of the squares of the grids' sides: 13 by default.

    Raises:
        TypeError: a backbone without ``feature_map``, or a side that is no integer.
        ValueError: grids without a cell or a ratio below 1; in a call, images smaller than a grid.

    Reference:
        Zhang et al., DeepEMD: Differentiable Earth Mover's Distance for Few-Shot Learning, TPAMI 2022; numbers and
        rounding are those of the official implementation.

    Example:
        >>> from fewshot_ext.models import conv4
        >>> Grid(conv4())(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 13, 64])
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        grids: Sequence[int] = (2, 3),
        ratio: float = 2.0,
        *,
        horizontal_flip: bool = True,
        preprocessing: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, horizontal_flip, preprocessing)
        self.grids, self.ratio = _checked_sides("grids", grids), ratio
        if not self.grids:
            raise ValueError("grids: expected at least one side, got none")
        check_at_least("ratio", ratio, 1)

    def draw(self, images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        # A cell of one pixel, not enlarged, has half a pixel on either side of its center: rounded, no area at all.
        if min(height, width) < 2 * max(self.grids):
            raise ValueError(
                f"images: expected at least {2 * max(self.grids)} x {2 * max(self.grids)} pixels for a grid of "
                f"{max(self.grids)} x {max(self.grids)}, got {height} x {width}"
            )
        boxes = []
        for side in self.grids:
            ratio = torch.full((len(images), 1), self.ratio, dtype=torch.float64)
            if self.training:
                ratio = 1 + 2 * torch.rand_like(ratio)
            (top, bottom), (left, right) = (_enlarged_cells(size, side, ratio) for size in (height, width))
            left, right = (part.repeat(1, side) for part in (left, right))
            top, bottom = (part.repeat_interleave(side, 1) for part in (top, bottom))
            boxes.append(torch.stack([left, top, right, bottom], -1))
        drawn = torch.cat(boxes, 1)
        mirrored = torch.rand(drawn.shape[:2]) < 0.5 * (self.training and self.horizontal_flip)
        return drawn, mirrored

    def extra_repr(self) -> str:
        return f"grids={self.grids}, ratio={self.ratio}, horizontal_flip={self.horizontal_flip}"


class Sampling(_Crops):
    """Random resized crops: 8 to 100 % of the stored image's area, with sides in a ratio of 3:4 to 4:3.

    In training they come from torch's global generator. In evaluation they are decided by ``seed`` and the pixels of
    the image, so that the features of an image are the same in every batch and in every run.

    Args:
        backbone, preprocessing: see :class:`LocalFeatures`.
        regions: crops an image.
        seed: decides the crops in evaluation.
        horizontal_flip: mirror half of the crops, in evaluation too, as the official implementation does. Never for
            digits or letters.

    Shape:
        ``[B, channels, H, W]`` -> ``[B, regions, C]``.

    Raises:
        TypeError: a backbone without ``feature_map``, or a number that is no integer.
        ValueError: no regions, or a negative seed.

    Reference:
        Zhang et al., DeepEMD: Differentiable Earth Mover's Distance for Few-Shot Learning, TPAMI 2022; numbers are
        those of the official implementation.

    Example:
        >>> from fewshot_ext.models import conv4
        >>> features, images = Sampling(conv4()).eval(), torch.rand(2, 3, 32, 32)
        >>> features(images).shape
        torch.Size([2, 9, 64])
        >>> torch.allclose(features(images)[1:], features(images[1:]), atol=1e-5)
        True
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        regions: int = 9,
        *,
        seed: int = 0,
        horizontal_flip: bool = True,
        preprocessing: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, horizontal_flip, preprocessing)
        check_count("regions", regions, 1)
        check_count("seed", seed, 0)
        self.regions, self.seed = regions, seed

    def draw(self, images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        uniform = torch.empty(len(images), self.regions, 2 * _ATTEMPTS + 3, dtype=torch.float64)
        if self.training:
            uniform.uniform_()
        else:
            for row, image in zip(uniform, images, strict=True):
                content = image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                row.uniform_(generator=derive_generator(self.seed, zlib.crc32(content)))
        return random_boxes(uniform[..., 1:], height, width), (uniform[..., 0] < 0.5) & self.horizontal_flip

    def extra_repr(self) -> str:
        return f"regions={self.regions}, seed={self.seed}, horizontal_flip={self.horizontal_flip}"


def pooled_regions(parts: tuple[int, int], cells: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The regions of an image behind a feature map that is pooled to fewer parts, row by row.

    Args:
        parts: rows and columns that are left, as ``adaptive_avg_pool2d`` makes them.
        cells: rows and columns of the feature map; with as many parts nothing is pooled.
        size: height and width of the image, in pixels.

    Returns:
        ``[rows * columns, 4]`` float64 (left, top, right, bottom) in pixels.

    Example:
        >>> pooled_regions((1, 2), (3, 3), (6, 6))
        tensor([[0., 0., 4., 6.],
                [2., 0., 6., 6.]], dtype=torch.float64)
    """
    edges = []
    for count, cell, pixels in zip(parts, cells, size, strict=True):
        index = torch.arange(count)
        first, last = index * cell // count, -(-(index + 1) * cell // count)
        edges.append(torch.stack([first, last]).double() * (pixels / cell))
    (top, bottom), (left, right) = edges
    rows, columns = len(top), len(left)
    boxes = [left.repeat(rows), top.repeat_interleave(columns), right.repeat(rows), bottom.repeat_interleave(columns)]
    return torch.stack(boxes, 1)


def random_boxes(uniform: Tensor, height: int, width: int) -> Tensor:
    """Boxes of random area, aspect and place, as torchvision's ``RandomResizedCrop`` has them.

    It draws area and aspect again while the box does not fit, ten times at most, and then takes the largest box of a
    legal aspect, in the middle of the image.

    Args:
        uniform: ``[..., 22]`` numbers of [0, 1) that decide them.
        height, width: of the image, in pixels.

    Returns:
        ``[..., 4]`` int64 (left, top, right, bottom).

    Example:
        >>> random_boxes(torch.full((22,), 0.5), 32, 32)
        tensor([ 4,  4, 28, 28])
    """
    place, draws = uniform[..., :2], uniform[..., 2:].unflatten(-1, (_ATTEMPTS, 2))
    area = height * width * (_SMALLEST_AREA + (1 - _SMALLEST_AREA) * draws[..., 0])
    aspect = _LARGEST_ASPECT ** (2 * draws[..., 1] - 1)
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1).round().long()  # [..., attempts, 2]
    limit = torch.tensor([width, height])
    fits = ((size >= 1) & (size <= limit)).all(-1)
    widest = min(width, round(height * _LARGEST_ASPECT))
    highest = min(height, round(width * _LARGEST_ASPECT))
    size = torch.cat([size, torch.tensor([widest, highest]).expand(*size.shape[:-2], 1, 2)], -2)
    first = F.pad(fits, (0, 1), value=True).long().argmax(-1)
    size = size.gather(-2, first[..., None, None].expand(*first.shape, 1, 2)).squeeze(-2)
    room = limit - size
    start = torch.where(fits.any(-1, keepdim=True), (place * (room + 1)).long(), room // 2)
    return torch.cat([start, start + size], -1)


def _enlarged_cells(size: int, side: int, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cells of a line begin and end, ``[B, side]`` each, enlarged by ratios ``[B, 1]``."""
    half = (size / side * ratio).long() // 2
    cell = size // side
    center = cell // 2 + cell * torch.arange(side)
    return (center - half).clamp_min(0), (center + half).clamp_max(size)


def _checked_sides(name: str, sides: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(sides, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(sides).__name__}")
    for side in sides:
        check_count(name, side, 1)
    return tuple(sides)
