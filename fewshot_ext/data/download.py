"""The image sets that have a public address: fetched, held against their checksum, unpacked."""

import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fewshot_ext import _extras
from fewshot_ext._files import file_sha256, temporary_folder
from fewshot_ext.data.unpack import unpack


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch, its size in bytes."""

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        return self.url.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class RemoteSet:
    """An image set to fetch: what it is, its files, and how to go on from what they unpack to."""

    summary: str
    files: tuple[RemoteFile, ...]
    next_step: str


_OMNIGLOT = "https://github.com/brendenlake/omniglot/raw/master/python"
_CVGL = "http://ftp.cs.stanford.edu/cs/cvgl"
# The checksums are those that TensorFlow Datasets (Apache 2.0) keeps for the same files. Stanford's have no https
# address: what comes over http is used only if its checksum is right, as everything else is.
REMOTE: dict[str, RemoteSet] = {
    "omniglot": RemoteSet(
        "1623 characters of 50 alphabets, 20 drawings each (MIT)",
        (
            RemoteFile(
                f"{_OMNIGLOT}/images_background.zip",
                "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
                9_464_212,
            ),
            RemoteFile(
                f"{_OMNIGLOT}/images_evaluation.zip",
                "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
                6_462_886,
            ),
        ),
        "fewshot-ext data pack --source {folder} --class-depth 2 --size 28 --mode L --invert --output omniglot28.npz",
    ),
    "cifar100": RemoteSet(
        "100 classes of 600 photographs, 32 x 32: the source of CIFAR-FS and FC100",
        (
            RemoteFile(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                168_513_733,
            ),
        ),
        "fewshot-ext data pack --source {folder}/cifar-100-binary --split cifar_fs --output cifar_fs.npz "
        "(or --split fc100)",
    ),
    "cub": RemoteSet(
        "Caltech-UCSD Birds 200-2011: 11,788 photographs of 200 kinds of birds",
        (
            RemoteFile(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                1_150_585_339,
            ),
        ),
        "fewshot-ext data pack --source {folder}/CUB_200_2011/images --split cub --size 384 --resize-mode stretch "
        "--jpeg-quality 95 --output cub384.npz (for retrieval --split halves --size 256, without "
        "--resize-mode)",
    ),
    "sop": RemoteSet(
        "Stanford Online Products: 120,053 photographs of 22,634 products",
        (
            RemoteFile(
                f"{_CVGL}/Stanford_Online_Products.zip",
                "b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
                3_083_860_082,
            ),
        ),
        "fewshot-ext data pack --source {folder}/Stanford_Online_Products --split "
        "{folder}/Stanford_Online_Products/Ebay_train.txt --size 256 --jpeg-quality 95 --output sop256.npz",
    ),
}
_IMAGENET = (
    "its pictures are ImageNet's, which are given to those who accept its terms: register at "
    "https://image-net.org, download the ILSVRC 2012 training images, and unpack them into one folder a class "
    "(n01440764, ...)"
)
BY_HAND = {
    "miniimagenet": f"{_IMAGENET}; or, if you have the pictures of mini-ImageNet (n0153282900000005.jpg, ...), put "
    "them into one folder. Then: fewshot-ext data pack --source FOLDER --split miniimagenet --size 256 --resize-mode "
    "stretch --jpeg-quality 95 --output miniimagenet256.npz, or with --size 384 for the recipes at 224 pixels. From "
    "all of ImageNet that takes every picture of the 100 classes, not the 600 a class of Ravi and Larochelle",
    "tieredimagenet": f"{_IMAGENET}. Then: fewshot-ext data pack --source FOLDER --split tieredimagenet --size 84 "
    "--resize-mode stretch --jpeg-quality 95 --output tieredimagenet84.npz",
    "cars196": "its first address (ai.stanford.edu/~jkrause) is gone, and for the files at others no checksum of its "
    f"authors is known. {_CVGL}/CARS196.zip holds the pictures, car_ims, and the list, cars_annos.mat; "
    "https://huggingface.co/datasets/XiN0919/FGVC, of a third party, has car_ims.tgz and cars_annos.mat. Take both "
    "from the same place, because copies number the pictures differently. Then: fewshot-ext data pack --source FOLDER "
    "--split FOLDER/cars_annos.mat --size 256 --jpeg-quality 95 --output cars196_256.npz. Where each class has its "
    "folder, as in copies on Kaggle, take --split halves",
    "inshop": "its pictures are given to those who accept its terms, on Google Drive: from "
    "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html go to the In-shop Clothes Retrieval Benchmark, fetch "
    "Img/img.zip (not img_highres) and Eval/list_eval_partition.txt, and unpack the first beside the second, so that "
    "FOLDER holds the list and the folder img. Then: fewshot-ext data pack --source FOLDER --split "
    "FOLDER/list_eval_partition.txt --size 256 --jpeg-quality 95 --output inshop256.npz",
}


def remote_set(name: str) -> RemoteSet:
    """The set called ``name``.

    Raises:
        ValueError: there is none; for a set that must be fetched by hand the message says how.
    """
    if name in BY_HAND:
        raise ValueError(f"{name} cannot be downloaded by a program: {BY_HAND[name]}")
    if name not in REMOTE:
        raise ValueError(f"name: expected one of {', '.join(REMOTE)} (by hand: {', '.join(BY_HAND)}), got {name!r}")
    return REMOTE[name]


def download(remote: RemoteSet, folder: str | Path, *, progress: bool = True) -> list[Path]:
    """Fetches the files of a set, unpacks them into ``folder``, and removes the packed files.

    A file fetched by an earlier call that was interrupted while it unpacked is not fetched again.

    Args:
        remote: what to fetch; see ``remote_set``.
        folder: where it goes; must exist.
        progress: show bars on a terminal.

    Returns:
        What was unpacked.

    Raises:
        ImportError: pooch or tqdm is missing.
        OSError: no network, an address that is gone, a full disk.
        ValueError: a file that does not match its checksum (which is removed), or that ``unpack`` refuses.
    """
    _extras.require("train", "pooch", "tqdm")
    folder = Path(folder).expanduser()
    unpacked = []
    for file in remote.files:
        packed = _fetch(file, folder, progress)
        with _bar(progress, f"unpacking {file.name}") as bar:
            unpacked += unpack(packed, folder, bar.update)
        packed.unlink()
    return unpacked


def _fetch(file: RemoteFile, folder: Path, progress: bool) -> Path:
    import pooch
    import requests

    packed = folder / file.name
    if packed.is_file() and file_sha256(packed) == file.sha256:
        return packed
    logger = pooch.get_logger()
    level = logger.level
    with _bar(progress, f"fetching {file.name}", file.size) as bar, temporary_folder(folder, "fetching") as temporary:
        try:
            logger.setLevel("ERROR")
            # Pooch's own 1 KiB are written to the disk one by one.
            fetch = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 18, timeout=30)
            found = pooch.retrieve(file.url, f"sha256:{file.sha256}", file.name, temporary, downloader=fetch)
            Path(found).replace(packed)
        except (requests.ConnectionError, requests.Timeout) as error:
            host = urlsplit(file.url).netloc
            raise OSError(f"cannot fetch {file.url}: {host} does not answer; is there a network?") from error
        except ValueError as error:
            raise ValueError(f"{file.url} gave another file than expected, which was removed: {error}") from error
        except OSError as error:
            raise OSError(f"cannot fetch {file.url}: {error}") from error
        finally:
            logger.setLevel(level)
    return packed


def _bar(progress: bool, what: str, total: int | None = None):
    from tqdm import tqdm

    disable = None if progress else True
    return tqdm(None, what, total, file=sys.stderr, disable=disable, unit="B", unit_scale=True, dynamic_ncols=True)
