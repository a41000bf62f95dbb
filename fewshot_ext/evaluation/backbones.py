"""Frozen networks, with a name for tables and a record of where they come from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewshot_ext._files import file_sha256
from fewshot_ext.evaluation.protocol import extract_features
from fewshot_ext.models import CheckpointSettings, LocalFeaturesConfig, Network, as_network, load_network
from fewshot_ext.models.network import DEFAULT, default_file

_NOTHING_GIVEN = CheckpointSettings()


@dataclass(frozen=True, eq=False)
class FrozenBackbone:
    """A network and what tables and records call it; ``open`` makes one of anything.

    Args:
        name: what tables and messages call it.
        network: maps ``[B, C, H, W]`` uint8 to features ``[B, D]``.
        sha256: checksum of its checkpoint, where it comes from one.
        path: of that checkpoint, for the record.
    """

    name: str
    network: Network
    sha256: str | None = None
    path: str | None = None

    @classmethod
    def open(
        cls,
        source: "FrozenBackbone | Network | nn.Module | str | Path",
        preprocessing: Callable[[Tensor], Tensor] | None = None,
    ) -> "FrozenBackbone":
        """What ``source`` stands for, in evaluation mode; see ``fewshot_ext.models.as_network``.

        Args:
            source: a network, a module, the path of a checkpoint or the name of a timm model; a ``FrozenBackbone`` is
                given back as it is.
            preprocessing: for a module of one's own: maps ``[B, C, H, W]`` uint8 to its input.

        Raises:
            ImportError: the source is a name and timm is missing.
            OSError: the checkpoint cannot be read.
            TypeError: a source of another kind.
            ValueError: no checkpoint in the file, a name that timm does not know, or a preprocessing for a
                source that has its own.

        Example:
            >>> FrozenBackbone.open(nn.Flatten()).network(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8))
            tensor([[1., 1.]])
        """
        if isinstance(source, cls):
            return source
        network = as_network(source, preprocessing)
        if "network" in network.made_from and isinstance(source, str | Path):
            return cls._of_file(network, source)
        return cls(network.made_from.get("timm", type(source).__name__), network)

    @classmethod
    def from_checkpoint(cls, path: str | Path, settings: CheckpointSettings = _NOTHING_GIVEN) -> "FrozenBackbone":
        """The network behind a checkpoint of any training or of other code; no code in the file is run.

        Args:
            path: the file; or "timm:NAME", for a model of timm; or "default", as ``load_network`` has it.
            settings: what a checkpoint of other code does not hold; see ``fewshot_ext.models.CheckpointSettings``.

        Raises:
            ImportError: a model of timm or the default network is asked for, and its extra is missing.
            OSError: the file cannot be read.
            ValueError: it is no checkpoint that is known, or is damaged, or settings are given for one of ours.
        """
        if str(path).startswith("timm:"):
            network = load_network(str(path), settings)
            return cls(network.made_from["timm"], network)
        return cls._of_file(load_network(path if path == DEFAULT else Path(path), settings), path)

    @classmethod
    def _of_file(cls, network: Network, path: str | Path) -> "FrozenBackbone":
        path = default_file() if path == DEFAULT else Path(path).expanduser()
        return cls(path.name, network, sha256=file_sha256(path), path=str(path))

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
        module, kind, layout = self.network, "", "[B, D]"
        try:
            if local_features is not None:
                module = self.network.local_features(local_features)
                kind, layout = f"{local_features.name} ", "[B, N, C]"
            features = extract_features(module.to(device), image)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"backbone {self.name} does not take the {shape} images of {data_name}: {error}"
            ) from error
        if features.dim() != len(layout.split(",")):
            raise ValueError(f"backbone {self.name}: expected {kind}features {layout}, got {list(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"backbone {self.name} gives features that are not finite: its training has diverged")
        return features


def state_checksum(network: Network) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a network's parameters and buffers; of the backbone's alone
    where nothing stands before it."""
    module = network.backbone if isinstance(network.preprocessing, nn.Identity) else network
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
