"""Models of timm: made by their names, with weights from a file, and as backbones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_ext import _extras
from fewshot_ext._files import as_text
from fewshot_ext._formats import MISFITS, misfits_named, read_weights
from fewshot_ext.models.checkpoint import tell_once
from fewshot_ext.models.foreign import fresh_counters, listed, misfit, plain_state


def timm_model(name: str, image_size: int | None = None, **options: Any) -> nn.Module:
    """A model of timm without classifier, which takes images of any size where timm offers that.

    Args:
        name: as ``timm.list_models`` has it.
        image_size: side of the square images that position embeddings are made for, where the model has them; by
            default the one that it was trained with.
        options: of ``timm.create_model``; without ``pretrained`` its weights are random.

    Raises:
        ImportError: timm is missing.
        ValueError: timm knows no such model, or it does not take images of this size.
    """
    _extras.require("timm", "timm")
    import timm

    if not timm.is_model(name):
        raise ValueError(f"backbone: expected a checkpoint file or a model that timm knows, got {name!r}")
    options = {"pretrained": False, **options, "num_classes": 0}
    # Which options a model has shows in it alone.
    with torch.device("meta"):
        plain = timm.create_model(name, pretrained=False, num_classes=0)
    if hasattr(plain, "dynamic_img_size"):
        options["dynamic_img_size"] = True
    if image_size is not None:
        TimmBackbone(plain).check_size(image_size, image_size)
        if _has_positions(plain):
            options["img_size"] = image_size
    return timm.create_model(name, **options)


def input_of(model: nn.Module) -> dict[str, Any]:
    """What a model of timm was trained on: ``input_size`` as (channels, height, width), ``mean`` and ``std``."""
    import timm

    return timm.data.resolve_model_data_config(model)


def timm_weights(name: str, path: Path, image_size: int | None = None) -> dict[str, Tensor]:
    """The weights in a file that a model of timm has without its classifier.

    Those of a transformer may be for images of another size, or in a layout of its authors that timm knows: timm
    converts them, and a logged warning says so.

    Args:
        name, image_size: see :func:`timm_model`.
        path: the file.

    Raises:
        ImportError: timm is missing.
        OSError: the file cannot be read.
        ValueError: timm knows no such model, or the file does not hold its weights.
    """
    with torch.device("meta"):
        model = timm_model(name, image_size)
    own = model.state_dict()
    with misfits_named(f"{path} does not hold the weights of timm's {name}"):
        state = plain_state(read_weights(path, scalars=True), (None, "state_dict", "model"))
        if state is None:
            raise ValueError("it holds no state_dict")
        heads = model.default_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        kept = {key: value for key, value in state.items() if not key.startswith(heads)}
        kept = fresh_counters(own, kept) | kept
        # In place of no weights timm would download some.
        if kept and _has_positions(model) and _shapes(kept) != _shapes(own):
            try:
                kept = _converted(name, image_size, kept, path)
            except (*MISFITS, AssertionError) as error:
                # The names tell more than what timm stumbled upon.
                raise ValueError(misfit(own, kept) or " ".join(str(error).split())) from error
        if trouble := misfit(own, kept):
            raise ValueError(trouble)
        model.load_state_dict(kept, assign=True)
    return kept


def _has_tokens(model: nn.Module) -> bool:
    # No other model of timm says how many of its tokens are no patches.
    return hasattr(model, "num_prefix_tokens")


def _has_positions(model: nn.Module) -> bool:
    # Others with windows in place of position embeddings would change these with the size.
    return _has_tokens(model) and hasattr(model, "set_input_size")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _converted(name: str, image_size: int | None, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What timm makes of weights in another layout."""
    # As many classes as the model has: otherwise timm does not mind what is missing.
    weights = {"state_dict": state, "num_classes": 0}
    made = timm_model(name, image_size, pretrained=True, pretrained_cfg_overlay=weights).state_dict()
    before, after = _shapes(state), _shapes(made)
    told = [f"{key} {before[key]} becomes {after[key]}" for key in made if before.get(key, after[key]) != after[key]]
    told += [f"{key} is renamed or left out" for key in sorted(before.keys() - after.keys())]
    tell_once(as_text(f"timm fits the weights in {path} to its {name}: {listed(told)}"))
    return made


class TimmBackbone(nn.Module):
    """A model of timm as what offers ``feature_map``.

    The map of a transformer is that of the tokens of its patches behind the last block and its normalization, without
    the tokens of class and registers.

    Raises:
        ValueError: in a call, images of a size that the model does not take, or a model without a map.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self._called(self.model, pixels)

    def feature_map(self, pixels: Tensor) -> Tensor:
        return self._called(self._patches if _has_tokens(self.model) else self._positions, pixels)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError where patches do not cover images of ``height`` x ``width`` pixels."""
        embedding = getattr(self.model, "patch_embed", None)
        if _has_tokens(self.model) and hasattr(embedding, "feat_ratio"):
            rows, columns = embedding.feat_ratio(as_scalar=False)
            if height % rows or width % columns:
                raise ValueError(
                    f"image_size: expected a multiple of {rows}, the side of a patch of {type(self.model).__name__}, "
                    f"got {height} x {width}"
                )

    def _called(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        self.check_size(height, width)
        try:
            return function(pixels)
        except AssertionError as error:  # as which timm says that it does not take a size
            raise ValueError(
                f"image_size: expected one that {type(self.model).__name__} takes, got {height} x {width}: {error}"
            ) from error

    def _patches(self, pixels: Tensor) -> Tensor:
        return self.model.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[0]

    def _positions(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        channels = self.model.num_features
        if features.dim() == 4 and features.shape[1] == channels:
            return features
        if features.dim() == 4 and features.shape[3] == channels:  # some of them keep the channels last
            return features.permute(0, 3, 1, 2)
        raise ValueError(
            f"{type(self.model).__name__} gives features {list(features.shape)}, no map of {channels} channels"
        )
