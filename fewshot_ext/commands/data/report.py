"""What `data pack` and `data info` both say about an archive."""

from pathlib import Path

from fewshot_ext.data import ImageArchive, Split, contact_sheet

_COLOURS = {Split.BASE: "#0072B2", Split.VALIDATION: "#E69F00", Split.NOVEL: "#D55E00"}


def table(archive: ImageArchive) -> str:
    """Images, size, and for each role the number of classes and of images a class."""
    count, channels, height, width = archive.images.shape
    per_class = archive.labels.bincount(minlength=archive.num_classes)
    lines = [
        f"{count:,} images of {height} x {width} pixels, {'grey' if channels == 1 else 'RGB'}",
        f"{'':<12}{'classes':>9}{'images':>10}{'images a class':>18}",
    ]
    for role in Split:
        own = per_class[archive.class_split == role]
        if len(own):
            low, high = own.min().item(), own.max().item()
            spread = f"{low}" if low == high else f"{low} to {high}"
            lines.append(f"{role.name.lower():<12}{len(own):>9,}{own.sum().item():>10,}{spread:>18}")
    return "\n".join(lines)


def write_preview(archive: ImageArchive, path: Path) -> None:
    """A contact sheet of up to 64 classes, spread evenly, one image each; the border tells the role."""
    first = {label: index for index, label in reversed(list(enumerate(archive.labels.tolist())))}
    labels = sorted(first)
    labels = [labels[number * len(labels) // min(64, len(labels))] for number in range(min(64, len(labels)))]
    names = archive.class_words or archive.class_names
    contact_sheet(
        [archive.images[first[label]] for label in labels],
        [names[label] for label in labels],
        borders=[_COLOURS[Split(archive.class_split[label].item())] for label in labels],
    ).save(path)


LEGEND = "borders: blue for base, orange for validation, vermilion for novel classes"
