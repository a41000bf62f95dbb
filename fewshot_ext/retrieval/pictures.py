"""Labeled images for retrieval, from a set or from folders, and pictures of what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewshot_ext._files import as_text
from fewshot_ext._threads import in_threads
from fewshot_ext.data import ImageArchive, Split, contact_sheet
from fewshot_ext.data.folders import list_folder
from fewshot_ext.data.fonts import caption_font, drawable
from fewshot_ext.data.pictures import picture_size, wrapped
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.images import ImageBatches

if TYPE_CHECKING:
    from PIL import Image

# Okabe and Ito's bluish green and vermilion, which stay apart for every common kind of color blindness.
RIGHT, WRONG = "#009E73", "#D55E00"
_FILES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images and their classes.

    Args:
        images: a uint8 tensor ``[N, C, H, W]`` or a list of N picture files.
        classes: the name of each image's class.
        names: what to call each image.
        titles: what pictures call a class, by its name, where that is a code.
        passed_over: a line on each kind of thing that a folder holds besides.
    """

    images: Tensor | list[Path]
    classes: list[str]
    names: list[str]
    titles: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    @classmethod
    def of_archive(cls, archive: ImageArchive) -> "LabeledImages":
        """All images of an archive, each named by its class and its number in it."""
        counts = [0] * archive.num_classes
        classes, names = [], []
        for label in archive.labels.tolist():
            classes.append(archive.class_names[label])
            names.append(f"{classes[-1]}/{counts[label]}")
            counts[label] += 1
        titles = dict(zip(archive.class_names, archive.class_titles, strict=True))
        return cls(archive.images, classes, names, titles, archive.passed_over)

    def parted(self, chosen: Tensor) -> tuple["LabeledImages", "LabeledImages"]:
        """The chosen images of an archive, and the others; each keeps its name.

        Args:
            chosen: ``[N]`` bool.

        Example:
            >>> images = LabeledImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["a", "a"], ["a/0", "a/1"])
            >>> [part.names for part in images.parted(torch.tensor([False, True]))]
            [['a/1'], ['a/0']]
        """
        return self._select(chosen), self._select(~chosen)

    def _select(self, chosen: Tensor) -> "LabeledImages":
        index = chosen.nonzero().flatten().tolist()
        return replace(
            self,
            images=self.images[chosen],
            classes=[self.classes[i] for i in index],
            names=[self.names[i] for i in index],
        )

    @classmethod
    def of_folder(cls, root: str | Path) -> "LabeledImages":
        """The pictures of a folder with a folder for each class, see ``fewshot_ext.data.read_folder``.

        Raises:
            ImportError: Pillow is missing.
            OSError: no such folder, or a file that cannot be opened.
            ValueError: a folder without classes, a class without pictures, or a file that is no picture.
        """
        listing = list_folder(root, Split.NOVEL)
        for _ in in_threads(picture_size, listing.files):  # opens each, and reads no pixels yet
            pass
        names = [as_text(file) for file in listing.files]
        return cls(listing.files, listing.classes, names, passed_over=listing.passed_over)

    def __len__(self) -> int:
        return len(self.classes)

    def title(self, index: int) -> str:
        """What pictures call the class of an image."""
        return self.titles.get(self.classes[index], self.classes[index])

    def pixels(self, backbone: FrozenBackbone, index: Sequence[int]) -> list[Tensor]:
        """``[C, H, W]`` uint8 of some images, as the backbone sees them.

        Raises:
            ValueError: a file that is damaged.
        """
        chosen = (
            self.images[torch.tensor(index)] if isinstance(self.images, Tensor) else [self.images[i] for i in index]
        )
        return [image for batch in _batches(chosen, backbone, len(index)) for image in batch]

    def in_memory(self, backbone: FrozenBackbone, on_progress: Callable[[int], Any]) -> "LabeledImages":
        """The same, with picture files read to a tensor as the backbone sees them.

        Args:
            backbone: decides their size and channels.
            on_progress: called with the number of images of each batch.

        Raises:
            ValueError: a file that is damaged.
        """
        if isinstance(self.images, Tensor):
            return self
        pixels: Tensor | None = None
        done = 0
        for batch in _batches(self.images, backbone, _FILES_AT_ONCE):
            if pixels is None:
                pixels = batch.new_empty(len(self), *batch.shape[1:])
            pixels[done : done + len(batch)] = batch
            done += len(batch)
            on_progress(len(batch))
        return replace(self, images=pixels)

    @torch.inference_mode()
    def embed(self, backbone: FrozenBackbone, batch_size: int, on_progress: Callable[[int], Any]) -> Tensor:
        """``[N, D]`` float32 embeddings, on the device of the backbone.

        Args:
            backbone: in evaluation mode.
            batch_size: images a forward pass.
            on_progress: called with the number of images of each pass.

        Raises:
            ValueError: a file that is damaged, or embeddings that are not finite.
        """
        device = next((value.device for value in backbone.network.state_dict().values()), torch.device("cpu"))
        found = []
        for batch in _batches(self.images, backbone, batch_size):
            found.append(backbone.network(batch.to(device)).float())
            on_progress(len(batch))
        embeddings = torch.cat(found)
        finite = embeddings.isfinite().all(1)
        if not finite.all():
            first = self.names[int((~finite).nonzero()[0, 0])]
            raise ValueError(f"the embeddings of {backbone.name} are not finite, the first that of {first}")
        return embeddings


def common_labels(*sets: LabeledImages) -> list[Tensor]:
    """``[N]`` int64 of each set: one number a class, the same in all of them.

    Example:
        >>> images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> queries, gallery = (LabeledImages(images, classes, classes) for classes in (["a", "c"], ["c", "b"]))
        >>> common_labels(queries, gallery)
        [tensor([0, 2]), tensor([2, 1])]
    """
    number = {name: label for label, name in enumerate(sorted({name for part in sets for name in part.classes}))}
    return [torch.tensor([number[name] for name in part.classes]) for part in sets]


def neighbor_rows(
    queries: LabeledImages,
    gallery: LabeledImages,
    neighbors: Tensor,
    asked: Sequence[int] | None = None,
    places: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One row a query and neighbor: which, of which class, and whether it is the query's.

    Args:
        queries, gallery: the images.
        neighbors: ``[q, k]`` int64 rows of the gallery, the nearest first.
        asked: the query of each row of ``neighbors``; all queries where None.
        places: ``[q, k]``, which place each had before it was put in another order, for a column of its own.
    """
    asked = range(len(queries)) if asked is None else asked
    before = None if places is None else places.tolist()
    return [
        {
            "query": queries.names[query],
            "query_class": queries.classes[query],
            "rank": rank,
            **({} if before is None else {"rank_by_embedding": before[row][rank - 1]}),
            "neighbor": gallery.names[neighbor],
            "neighbor_class": gallery.classes[neighbor],
            "right": queries.classes[query] == gallery.classes[neighbor],
        }
        for row, (query, found) in enumerate(zip(asked, neighbors.tolist(), strict=True))
        for rank, neighbor in enumerate(found, start=1)
    ]


def neighbor_sheet(
    backbone: FrozenBackbone,
    queries: LabeledImages,
    gallery: LabeledImages,
    neighbors: Tensor,
    asked: Sequence[int],
    *,
    places: Tensor | None = None,
    heading: str = "",
) -> "Image.Image":
    """A row a query: the query first, then its neighbors, each marked right or wrong in words and by its border.

    Args:
        backbone: as which it is seen.
        queries, gallery: the images.
        neighbors: ``[q, k]`` int64 rows of the gallery, the nearest first.
        asked: the query of each row of ``neighbors``.
        places: ``[q, k]``, which place each had before it was put in another order; the captions name it.
        heading: written above the rows.

    Raises:
        ImportError: Pillow is missing.
        ValueError: a picture that is damaged.
    """
    images, captions, borders = [], [], []
    own = queries.pixels(backbone, asked)
    near = gallery.pixels(backbone, neighbors.flatten().tolist())
    rows = neighbor_rows(queries, gallery, neighbors, asked, places)
    depth = neighbors.shape[1]
    for i, query in enumerate(asked):
        images += [own[i], *near[i * depth : (i + 1) * depth]]
        captions.append(f"query\n{queries.title(query)}")
        borders.append(None)
        for row, neighbor in zip(rows[i * depth : (i + 1) * depth], neighbors[i].tolist(), strict=True):
            was = "" if places is None else f", was {row['rank_by_embedding']}"
            captions.append(f"{'right' if row['right'] else 'wrong'}{was}\n{gallery.title(neighbor)}")
            borders.append(RIGHT if row["right"] else WRONG)
    sheet = contact_sheet(images, captions, columns=depth + 1, borders=borders)
    return _below(heading, sheet) if heading else sheet


def _below(heading: str, sheet: "Image.Image") -> "Image.Image":
    from PIL import ImageDraw, ImageOps

    gap, font = 8, caption_font(13)
    text = wrapped(drawable(heading), font, sheet.width - 2 * gap)
    line_height = sum(font.getmetrics())
    height = (text.count("\n") + 1) * line_height
    sheet = ImageOps.expand(sheet, (0, height + gap, 0, 0), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(text.split("\n")):
        draw.text((gap, gap + number * line_height), line, fill="black", font=font)
    return sheet


def _batches(images: Tensor | list[Path], backbone: FrozenBackbone, batch_size: int) -> ImageBatches:
    network = backbone.network
    return ImageBatches(
        images,
        channels=network.channels,
        image_size=network.image_size,
        batch_size=batch_size,
        resize_mode=network.resize_mode,
    )
