"""Models of timm: made by their names, with weights from a file, and as backbones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fewshot_ext import _extras
from fewshot_ext._formats import misfits_named, read_weights
from fewshot_ext.models.foreign import fresh_counters, misfit, plain_state


def timm_weights(name: str, path: Path) -> dict[str, Tensor]:
    """The weights in a file that a model of timm has without its classifier.

    Raises:
        ImportError: timm is missing.
        OSError: the file cannot be read.
        ValueError: timm knows no such model, or the file does not hold its weights.
    """
    model = timm_model(name)
    with misfits_named(f"{path} does not hold the weights of timm's {name}"):
        state = plain_state(read_weights(path, scalars=True), (None, "state_dict", "model"))
        if state is None:
            raise ValueError("it holds no state_dict")
        heads = model.default_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        kept = {key: value for key, value in state.items() if not key.startswith(heads)}
        kept = fresh_counters(model.state_dict(), kept) | kept
        if trouble := misfit(model.state_dict(), kept):
            raise ValueError(trouble)
        model.load_state_dict(kept, assign=True)
    return kept


def timm_model(name: str) -> nn.Module:
    """A model of timm without classifier and without memory."""
    _extras.require("timm", "timm")
    import timm

    if not timm.is_model(name):
        raise ValueError(f"backbone: expected a checkpoint file or a model that timm knows, got {name!r}")
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0)


class TimmBackbone(nn.Module):
    """A model of timm as what offers ``feature_map``; some of them keep the channels last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

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
