"""The .npz file of an archive: what goes in comes out, and nothing else is believed."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_ext.data import ImageArchive, archive_file


def same(one: ImageArchive, other: ImageArchive) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.class_split, other.class_split)
        and (one.class_names, one.class_words) == (other.class_names, other.class_words)
        and one.image_fields.keys() == other.image_fields.keys()
        and all(torch.equal(value, other.image_fields[name]) for name, value in one.image_fields.items())
    )


def old_arrays(**changes):
    """The arrays of a pack without version and checksum; ``changes`` spoil it, None removes."""
    arrays = {
        "images": np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3),
        "labels": np.array([0, 0, 1, 1], np.int16),
        "class_names": np.array(["a", "b"]),
        "class_split": np.array([0, 2], np.uint8),
        **changes,
    }
    return {key: value for key, value in arrays.items() if value is not None}


def encoded(*images, format="JPEG"):
    files = []
    for image in images:
        buffer = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format)
        files.append(buffer.getvalue())
    return files


def jpeg_arrays(files, **changes):
    parts = {"data": np.frombuffer(b"".join(files), np.uint8), "offsets": np.cumsum([0, *map(len, files)])}
    return old_arrays(**{"images": None, **parts, **changes})


def test_an_archive_comes_back_as_it_was(archive, tmp_path):
    archive.save(tmp_path / "a.npz")
    back = ImageArchive.load(tmp_path / "a.npz")
    assert same(back, archive)
    assert back.checksum() == archive.checksum()
    assert archive_file.has_checksum(tmp_path / "a.npz")


def test_the_same_archive_gives_the_same_bytes_and_replaces_the_file(archive, tmp_path):
    archive.save(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("something old")
    archive.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_and_small(channels, tmp_path):
    ramp = torch.linspace(0, 255, 64 * 64).byte().view(1, 1, 64, 64).expand(5, channels, -1, -1)
    archive = ImageArchive(ramp, torch.zeros(5, dtype=torch.int64), ("a",), torch.zeros(1, dtype=torch.uint8))
    archive.save(tmp_path / "a.npz", jpeg_quality=95)
    back = ImageArchive.load(tmp_path / "a.npz")
    assert back.images.shape == archive.images.shape
    assert (back.images.int() - archive.images.int()).abs().max() <= 8
    assert (tmp_path / "a.npz").stat().st_size < archive.images.numel() / 2


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_a_jpeg_quality_out_of_range(archive, tmp_path, quality):
    with pytest.raises(ValueError, match=rf"jpeg_quality: expected a number in \[1, 100\], got {quality}"):
        archive.save(tmp_path / "a.npz", jpeg_quality=quality)
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(archive, tmp_path, monkeypatch):
    archive.save(tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    written = []

    def full(stream, array, **options):
        written.append(array)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        stream.write(b"x")

    monkeypatch.setattr(archive_file.npy, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        archive.save(tmp_path / "a.npz")
    assert len(written) == 3
    assert (tmp_path / "a.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_pack_without_version_and_checksum(tmp_path):
    np.savez(tmp_path / "a.npz", **old_arrays(drawer=np.arange(4, dtype=np.uint8)))
    archive = ImageArchive.load(tmp_path / "a.npz")
    assert archive.images.shape == (4, 1, 3, 3)
    assert archive.images[2, 0, 1, 2] == 2 * 9 + 5
    assert archive.image_fields["drawer"].tolist() == [0, 1, 2, 3]
    assert not archive_file.has_checksum(tmp_path / "a.npz")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_encoded_images_are_decoded_in_order(tmp_path, format):
    images = [np.full((4, 6, 3), 40 * index, np.uint8) for index in range(4)]
    np.savez(tmp_path / "a.npz", **jpeg_arrays(encoded(*images, format=format)))
    archive = ImageArchive.load(tmp_path / "a.npz")
    assert archive.images.shape == (4, 3, 4, 6)
    assert archive.images[:, 0, 0, 0].tolist() == [0, 40, 80, 120]


PLAIN = encoded(*[np.full((4, 6), 40 * index, np.uint8) for index in range(4)], format="PNG")
COLOR = encoded(np.zeros((4, 6, 3), np.uint8), format="PNG")
WIDE = encoded(np.zeros((4, 7), np.uint8), format="PNG")


def enormous_png():
    """A PNG of a few bytes whose header claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 100) + b"IDAT"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            old_arrays(images=np.zeros((4, 3, 3), np.float32)),
            "'images' in .*: expected uint8 of 3 or 4 dimensions, got fl",
        ),
        (
            old_arrays(images=np.zeros((4, 9), np.uint8)),
            r"'images' in .*: expected uint8 .* got uint8 of shape \(4, 9\)",
        ),
        (old_arrays(images=None), r"images \(or data and offsets\) missing; it holds labels, class_names, class_split"),
        (old_arrays(labels=None), "labels missing"),
        (old_arrays(labels=np.zeros(4)), "'labels' in .*: expected integers of 1 dimensions, got float64"),
        (old_arrays(labels=np.array([0, 0, 1, 2])), r"labels: expected numbers in \[0, 2\), got 0 to 2"),
        (old_arrays(labels=np.array([0, 0, 1])), "4 images, 3 labels"),
        (old_arrays(class_names=np.array([1, 2])), "'class_names' in .*: expected text of 1 dimensions, got int64"),
        (old_arrays(class_names=np.array(["a", "a"])), "class_names: expected all to be different"),
        (old_arrays(class_names=np.array(["a", "b"], object)), "'class_names' in .* holds Python objects"),
        (old_arrays(class_split=np.array([0, 7])), "class_split: expected 0 .* got 0 to 7"),
        (old_arrays(class_words=np.array(["a"])), "class_words: expected one text a class: 2 classes, 1 texts"),
        (old_arrays(drawer=np.zeros(3, int)), "'drawer'.*: expected one value an image: 4 images, 3 values"),
        (old_arrays(drawer=np.zeros(4)), "'drawer' in .*: expected integers of 1 dimensions, got float64"),
        (old_arrays(format_version=np.array(2)), "has format version 2; this fewshot_ext reads up to 1: update it"),
        (old_arrays(format_version=np.array("1")), "'format_version' in .*: expected integers of 0 dimensions"),
        (old_arrays(sha256=np.array("0" * 64)), "is damaged or was changed: the sha256 of its arrays is"),
        (jpeg_arrays(PLAIN, images=np.zeros((4, 3, 3), np.uint8)), "holds both images and data"),
        (jpeg_arrays(PLAIN, offsets=None), r"images \(or data and offsets\) missing"),
        (jpeg_arrays(PLAIN, offsets=np.array([0, 10, 5, 20, 30])), "'offsets' in .* expected to rise from 0 to the"),
        (jpeg_arrays(PLAIN, offsets=np.array([0, 10])), "'offsets' in .* expected to rise from 0 to the"),
        (jpeg_arrays(PLAIN, offsets=np.array([0])), "'offsets' in .*: expected to rise"),
        (jpeg_arrays(PLAIN, offsets=np.zeros(0, int)), "'offsets' in .*: expected to rise"),
        (jpeg_arrays([*PLAIN[:2], *WIDE, PLAIN[3]]), "image 2 in .*: it is 7 x 4 L, but the first image is 6 x 4 L"),
        (jpeg_arrays([*PLAIN[:3], *COLOR]), "image 3 in .*: it is 6 x 4 RGB, but the first image is 6 x 4 L"),
        (jpeg_arrays([*PLAIN[:1], b"no picture", *PLAIN[2:]]), "image 1 in .* is not a picture"),
        (jpeg_arrays([*PLAIN[:3], PLAIN[3][:-24]]), "cannot decode image 3 in"),
        (jpeg_arrays([PLAIN[0], enormous_png(), *PLAIN[2:]]), "image 1 in .* has too many pixels"),
        (
            jpeg_arrays(encoded(Image.new("RGBA", (6, 4)), format="PNG") * 4),
            "image 0 in .* is 6 x 4 RGBA; an archive ho",
        ),
        (
            jpeg_arrays(encoded(Image.new("RGB", (6, 4)), format="GIF") * 4),
            r"image 0 in .* is not a picture.*\(formats: JPEG, PNG\)",
        ),
    ],
)
def test_what_an_archive_must_not_hold_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        ImageArchive.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


def test_a_changed_array_does_not_match_the_checksum(archive, tmp_path):
    archive.save(tmp_path / "a.npz")
    arrays = dict(np.load(tmp_path / "a.npz"))
    arrays["labels"] = arrays["labels"][::-1]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz' is damaged or was changed"):
        ImageArchive.load(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_file_cut_short(archive, tmp_path, kept):
    archive.save(tmp_path / "a.npz")
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"a\.npz' is not an \.npz file, is damaged or cut short"):
        ImageArchive.load(tmp_path / "a.npz")


def test_any_flipped_byte_is_found_or_harmless(archive, tmp_path):
    archive.save(tmp_path / "a.npz")
    content = bytearray((tmp_path / "a.npz").read_bytes())
    refused = 0
    for position in range(0, len(content), 7):
        spoilt = bytearray(content)
        spoilt[position] ^= 0x41
        (tmp_path / "b.npz").write_bytes(spoilt)
        try:
            assert same(ImageArchive.load(tmp_path / "b.npz"), archive)
        except ValueError as error:
            refused += 1
            assert "b.npz" in str(error)
    assert refused > len(content) / 7 / 2


def test_a_header_that_claims_more_than_follows_is_refused_before_memory_is_set_aside(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file, file.open("images.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(b"few")
    with pytest.raises(ValueError, match=r"'images' in .*a\.npz' is damaged: its header says shape \(1000000000, 1000"):
        ImageArchive.load(tmp_path / "a.npz")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no image archive .*missing\.npz"):
        ImageArchive.load(tmp_path / "missing.npz")
    with pytest.raises(IsADirectoryError, match="is a folder, not an image archive"):
        ImageArchive.load(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"a\.npz' is not an image archive: it holds 'notes\.txt'"):
        ImageArchive.load(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", "hello")
    with pytest.raises(ValueError, match=r"'images' in .*a\.npz' is not a numpy array"):
        ImageArchive.load(tmp_path / "a.npz")


def test_a_pickle_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    np.savez(tmp_path / "a.npz", **old_arrays(labels=np.array([Trap()] * 4, object)))
    with pytest.raises(ValueError, match=r"'labels' in .* holds Python objects; they are pickles"):
        ImageArchive.load(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


def test_checksum_tells_contents_apart(archive):
    other = ImageArchive(archive.images, archive.labels.flip(0), archive.class_names, archive.class_split)
    assert len({archive.checksum(), other.checksum(), archive.subset(0).checksum()}) == 3
