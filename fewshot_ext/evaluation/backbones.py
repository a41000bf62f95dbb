"""Backbones with frozen weights, from uint8 images to features: of a checkpoint, of timm, or anybody's module."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewshot_ext import _extras
from fewshot_ext._files import file_sha256
from fewshot_ext.data import ImageInput
from fewshot_ext.data.augmentation import resized_size
from fewshot_ext.evaluation.protocol import extract_features
from fewshot_ext.models import LocalFeatures, LocalFeaturesConfig, build_local_features


@dataclass(frozen=True, eq=False)
class FrozenBackbone:
    """A feature extractor and what must be known to feed it and to build it again; ``open`` makes one of anything.

    Args:
        name: what tables and messages call it.
        module: maps ``[B, C, H, W]`` uint8 to features ``[B, D]``.
        similarity: of its pre-training, "cosine" or "softmax" (the inner product); fine-tuning goes on with it.
        channels: 1 or 3 where it takes only that, None where unknown.
        image_size: side to bring picture files to, None where unknown. Where the module itself resizes and then
            cuts out the middle, it is the side before the cut, so that nothing is scaled twice.
        sha256: checksum of its checkpoint, where it comes from one.
        path: of that checkpoint, for the record.
        origin: plain containers and tensors that ``rebuild`` makes it of again; empty for a module of one's own.
    """

    name: str
    module: nn.Module
    similarity: Literal["cosine", "softmax"] = "cosine"
    channels: int | None = None
    image_size: int | None = None
    sha256: str | None = None
    path: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, source: "FrozenBackbone | nn.Module | str | Path", preprocessing: Callable[[Tensor], Tensor] | None = None
    ) -> "FrozenBackbone":
        """The backbone that ``source`` stands for, in evaluation mode.

        Args:
            source: a module, the path of a checkpoint of ``fewshot-ext pretrain``, or the name of a timm model; a
                ``FrozenBackbone`` is given back as it is.
            preprocessing: for a module: maps ``[B, C, H, W]`` uint8 to its input; by default to [0, 1], and
                nothing for a module that holds an ``ImageInput`` and so takes uint8 itself.

        Raises:
            ImportError: the source is a name and timm is missing.
            OSError: the checkpoint cannot be read.
            TypeError: a source of another kind.
            ValueError: no checkpoint in the file, a name that timm does not know, or a preprocessing for a
                source that has its own.

        Example:
            >>> FrozenBackbone.open(nn.Flatten()).module(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8))
            tensor([[1., 1.]])
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, nn.Module):
            return cls._from_module(source, preprocessing)
        if not isinstance(source, str | Path):
            came = type(source).__name__
            raise TypeError(
                f"backbone must be a module, the path of a checkpoint or the name of a timm model, got {came}"
            )
        if preprocessing is not None:
            raise ValueError(f"preprocessing must be left out for {str(source)!r}, which brings its own")
        path = Path(source).expanduser()
        # A folder is no checkpoint, and must not stand in the way of a model that is called the same.
        is_word = path.is_dir() and path.name == str(source)
        if isinstance(source, Path) or path.suffix == ".ckpt" or (path.exists() and not is_word):
            return cls.from_checkpoint(path)
        return cls.from_timm(source)

    def local_features(self, config: LocalFeaturesConfig) -> LocalFeatures:
        """The module from the same uint8 images to local features ``[B, N, C]``; it shares the weights.

        Raises:
            TypeError: a backbone without feature maps.
        """
        # A Lightning module of ours has its extractor inside; an extractor has its preprocessing beside the backbone.
        whole = getattr(self.module, "extractor", self.module)
        if isinstance(getattr(whole, "input", None), ImageInput) and hasattr(whole, "backbone"):
            return build_local_features(config, whole.backbone, whole.input).eval()
        inner, preprocessing = whole, None
        if isinstance(whole, _Preprocessed):
            inner, preprocessing = whole.backbone, whole.preprocessing
        if "timm" in self.origin and hasattr(inner, "forward_features"):
            inner = _TimmMaps(inner).eval()
        if not callable(getattr(inner, "feature_map", None)):
            raise TypeError(
                f"backbone {self.name} gives no feature maps, which matching needs: {type(inner).__name__} has no "
                "method feature_map"
            )
        return build_local_features(config, inner, preprocessing).eval()

    def try_out(
        self,
        image: Tensor,
        data_name: str,
        local_features: LocalFeaturesConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Sends one image through: what does not fit, channels, size or diverged weights, shows there and no sooner.

        Args:
            image: ``[1, C, H, W]`` uint8.
            data_name: what a message calls the images.
            local_features: which maps are wanted; None for feature vectors.
            device: where the module goes.

        Returns:
            ``[1, D]`` or ``[1, N, C']``.

        Raises:
            ValueError: the backbone does not take the image, gives no maps, or gives features of another rank or that
                are not finite.
        """
        shape = "x".join(map(str, image.shape[1:]))
        module, kind, layout = self.module, "", "[B, D]"
        try:
            if local_features is not None:
                module, kind, layout = self.local_features(local_features), f"{local_features.name} ", "[B, N, C]"
            features = extract_features(module.to(device), image)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"backbone {self.name} does not take the {shape} images of {data_name}: {error}"
            ) from error
        if features.dim() != len(layout.split(",")):
            raise ValueError(f"backbone {self.name} must give {kind}features {layout}, got {list(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"backbone {self.name} gives features that are not finite: its training has diverged")
        return features

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "FrozenBackbone":
        """The backbone behind a checkpoint of any training; the file is read without running code in it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no checkpoint of a training, or is damaged.
        """
        from fewshot_ext.training.features import read_checkpoint

        path = Path(path).expanduser()
        checkpoint = read_checkpoint(path)
        backbone = cls.rebuild({"checkpoint": {key: checkpoint[key] for key in ("hyper_parameters", "state_dict")}})
        return replace(backbone, name=path.name, sha256=file_sha256(path), path=str(path))

    @classmethod
    def from_timm(cls, name: str, state_dict: dict[str, Tensor] | None = None) -> "FrozenBackbone":
        """A model of timm without its classifier, behind the normalisation that it was trained with.

        Args:
            name: as ``timm.list_models`` has it.
            state_dict: its weights; the trained ones, which timm downloads or has kept, where None.

        Raises:
            ImportError: timm is missing.
            ValueError: timm knows no such model.
        """
        _extras.require("timm", "timm")
        import timm

        if not timm.is_model(name):
            raise ValueError(f"backbone must be a checkpoint file or a model that timm knows, got {name!r}")
        if state_dict is not None:
            # Without memory: a name may stand for any size, until it is that of the weights.
            with torch.device("meta"):
                timm.create_model(name, pretrained=False, num_classes=0).load_state_dict(state_dict, assign=True)
        model = timm.create_model(name, pretrained=state_dict is None, num_classes=0)
        if state_dict is not None:
            model.load_state_dict(state_dict)
        data = timm.data.resolve_model_data_config(model)
        channels, image_size, _ = data["input_size"]
        return cls(
            name=name,
            module=_Preprocessed(ImageInput(data["mean"], data["std"]), model).eval(),
            channels=channels,
            image_size=image_size,
            origin={"timm": name, "state_dict": model.state_dict()},
        )

    @classmethod
    def rebuild(cls, origin: dict[str, Any]) -> "FrozenBackbone":
        """The backbone with this ``origin``."""
        if "timm" in origin:
            return cls.from_timm(origin["timm"], origin["state_dict"])
        from fewshot_ext.training.features import build_extractor, check_network

        check_network(origin["checkpoint"])
        settings = origin["checkpoint"]["hyper_parameters"]
        channels, height, width = settings["image_size"]
        stored = height if height == width else None
        extractor = build_extractor(origin["checkpoint"])
        return cls(
            name="checkpoint",
            module=extractor,
            # Metric training knows cosines alone.
            similarity=settings["config"].get("similarity", "cosine"),
            channels=channels,
            image_size=_size_of_files(extractor.input) or stored,
            origin=origin,
        )

    @classmethod
    def _from_module(cls, module: nn.Module, preprocessing: Callable[[Tensor], Tensor] | None) -> "FrozenBackbone":
        inputs = [part for part in module.modules() if isinstance(part, ImageInput)]
        whole = module
        if preprocessing is not None or not inputs:
            whole = _Preprocessed(preprocessing or _Pixels(), module)
            inputs += [preprocessing] if isinstance(preprocessing, ImageInput) else []
        return cls(
            name=type(module).__name__,
            module=whole.eval(),
            similarity=getattr(getattr(module, "config", None), "similarity", "cosine"),
            channels=len(inputs[0].mean) if inputs else None,
            image_size=_size_of_files(inputs[0]) if inputs else None,
        )


def state_checksum(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """The shortest parts of paths, cut from both ends, that still tell them apart.

    Raises:
        ValueError: a path comes twice.

    Example:
        >>> distinct_names(["runs/margin_-0.3/last.ckpt", "runs/margin_0/last.ckpt"])
        ['margin_-0.3', 'margin_0']
        >>> distinct_names(["runs/margin_0/last.ckpt"])
        ['last.ckpt']
    """
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{str(path)!r} is given twice")
    while min(map(len, parts)) > 1 and len({own[0] for own in parts}) == 1:
        parts = [own[1:] for own in parts]
    while min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    return ["/".join(own) for own in parts]


def _size_of_files(preprocessing: ImageInput) -> int | None:
    return None if preprocessing.image_size is None else resized_size(preprocessing.image_size)


class _Pixels(nn.Module):
    """uint8 to float in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images / 255


class _Preprocessed(nn.Module):
    """A module behind a preprocessing that need not be a module."""

    def __init__(self, preprocessing: Callable[[Tensor], Tensor], backbone: nn.Module) -> None:
        super().__init__()
        self.preprocessing, self.backbone = preprocessing, backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.preprocessing(images))


class _TimmMaps(nn.Module):
    """A model of timm as what offers ``feature_map``; some of them keep the channels last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def feature_map(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        channels = self.model.num_features
        if features.dim() == 4 and features.shape[1] == channels:
            return features
        if features.dim() == 4 and features.shape[3] == channels:
            return features.permute(0, 3, 1, 2)
        raise ValueError(
            f"{type(self.model).__name__} gives features {list(features.shape)}, no map of {channels} channels"
        )
