"""Checkpoints that other code wrote: found in the table of layouts, renamed and checked."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewshot_ext._formats import check_schema
from fewshot_ext._validation import check_choice, check_count, check_positive, plain_numbers
from fewshot_ext.data.augmentation import check_sizes
from fewshot_ext.models.config import BackboneConfig, fitted
from fewshot_ext.models.layouts import LAYOUTS, Layout, names_of, own_weights

# Old versions of torch did not write it, and no evaluation looks at it.
COUNTER = "num_batches_tracked"
# What stands before names in our checkpoints.
BACKBONE, HEAD, _PREPROCESSING = "network.backbone.", "head.", "network.preprocessing."
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class CheckpointSettings:
    """What other code's checkpoints do not hold. None takes what the paper of that code has.

    Args:
        image_size: side of the square images that the network is for. Without it a model of timm takes
            those of an image set as they are.
        mean: mean of each channel for pixels in [0, 1].
        std: standard deviation of each channel for pixels in [0, 1].
        similarity: how features compare, cosine or dot, by the loss that trained the network.
        scale: factor of the similarities in that loss.
        resize: side that images are resized to before the middle of image_size is cut out.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, or one of mean and std without the other.

    Example:
        >>> CheckpointSettings(image_size=84).given()
        {'image_size': 84}
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    similarity: Literal["cosine", "dot"] | None = None
    scale: float | None = None
    resize: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("image_size", "resize"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std: expected both or neither, got {self.mean} and {self.std}")
        if self.similarity is not None:
            check_choice("similarity", self.similarity, "cosine", "dot")
        if self.scale is not None:
            check_positive("scale", self.scale)

    def given(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class BringsItsOwn(ValueError):
    """Settings were given for a network that has its own."""

    @classmethod
    def check(cls, given: CheckpointSettings, owner: str) -> None:
        """Raises it unless nothing is given."""
        for name, value in given.given().items():
            raise cls(f"{name}: expected null {owner}, which brings its own, got {value}")


class Adopted(NamedTuple):
    """What a checkpoint of other code comes to.

    Attributes:
        settings: network, config, origin and, with a head, num_classes, as our checkpoints have them.
        state_dict: the weights by our names.
        sentence: what it was taken for, and what was assumed.
    """

    settings: dict[str, Any]
    state_dict: dict[str, Tensor]
    sentence: str


class _Reading(NamedTuple):
    """Weights read by a layout as those of a backbone."""

    layout: str
    backbone: str
    prefix: str
    state: Mapping[str, Tensor]

    def names(self) -> dict[str, str]:
        """Their name of each weight of ours."""
        return {own: self.prefix + other for own, other in names_of(self.layout, self.backbone).items()}

    def others(self) -> set[str]:
        """The names in the file that should be those of the backbone."""
        layout = LAYOUTS[self.layout]
        return {
            name for name in self.state if not _is_counter(name) and not layout.is_passed_over(name, self.prefix)
        } - set(self._projection())

    def unread(self) -> list[str]:
        """Names of the weights of a method that stand beside the backbone, without those of the head."""
        layout, head = LAYOUTS[self.layout], LAYOUTS[self.layout].head
        beside = [name for name in self.state if layout.is_model and not name.startswith(self.prefix)]
        return [name for name in beside if not (head and name.startswith(head))]

    def likeness(self) -> float:
        """Share of the names that file and backbone have in common."""
        expected, found = {name for name in self.names().values() if not _is_counter(name)}, self.others()
        return len(expected & found) / len(expected | found)

    def embedding(self) -> int | None:
        weight = self.state.get(next(iter(self._projection()), ""))
        return None if weight is None or weight.dim() != 2 else len(weight)

    def projection(self) -> dict[str, Tensor]:
        return {f"projection.{name.rpartition('.')[2]}": self.state[name] for name in self._projection()}

    def _projection(self) -> list[str]:
        """Names of the layer that an embedding of ours has behind the backbone."""
        if self.layout != "fewshot_ext" or not self.prefix.endswith("backbone."):
            return []
        place = self.prefix.removesuffix("backbone.") + "projection."
        return [place + leaf for leaf in ("weight", "bias") if place + leaf in self.state]

    def shape(self) -> tuple[int, int]:
        """Width of the backbone and channels of its images, by the first convolutions."""
        own = own_weights(self.backbone, 2)
        stem = self.state[self.names()[next(iter(own))]]
        # The stem of a WRN has 16 channels whatever its width.
        first = self.state[self.names()["blocks.0.conv1.weight"]] if "stem.weight" in own else stem
        return (len(first), stem.shape[1]) if stem.dim() == first.dim() == 4 else (2, 3)

    def misshapen(self) -> list[str]:
        """Names of weights with another shape than the backbone has, and both."""
        names = self.names()
        return [
            f"{names[own]} {list(self.state[names[own]].shape)}, expected {list(weight.shape)}"
            for own, weight in own_weights(self.backbone, *self.shape()).items()
            if names[own] in self.state and self.state[names[own]].shape != weight.shape
        ]


def plain_state(content: Any, wrappers: Iterable[str | None]) -> dict[str, Tensor] | None:
    """The first state_dict under one of these keys, without what ``DataParallel`` puts before all names; None where
    there is none.

    Raises:
        ValueError: it holds other tensors than dense ones.
    """
    for wrapper in wrappers:
        state = content if wrapper is None else content.get(wrapper) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
            continue
        if all(isinstance(value, Tensor) for value in state.values()):
            check_schema(state, {str: Tensor}, "the weights")
            parallel = all(name.startswith("module.") for name in state)
            return {name.removeprefix("module.") if parallel else name: value for name, value in state.items()}
    return None


def fresh_counters(expected: Iterable[str], found: Iterable[str]) -> dict[str, Tensor]:
    """Those counters of batches that are expected and not found, at zero; old versions of torch wrote none."""
    return {name: torch.zeros((), dtype=torch.int64) for name in {*expected} - {*found} if _is_counter(name)}


def misfit(expected: Iterable[str], found: Iterable[str]) -> str:
    """What is missing and what is left over, in words; empty where the names are the same."""
    expected, found = set(expected), set(found)
    missing, left = sorted(expected - found), sorted(found - expected)
    parts = [f"it lacks {listed(missing)}"] * bool(missing) + [f"left over are {listed(left)}"] * bool(left)
    return ", and ".join(parts)


def adopt(content: Any, given: CheckpointSettings) -> Adopted:
    """What other code's checkpoint comes to in our layout.

    Args:
        content: what ``read_weights`` gives.
        given: what is known beside it.

    Raises:
        ValueError: it fits no layout, or a backbone only nearly; the message says what was found.
    """
    reading = _recognized(content)
    layout = LAYOUTS[reading.layout]
    width, channels = reading.shape()
    head = _head(reading)
    values, assumed = _resolve(layout, reading.backbone, channels, head, given)
    size, resize = values["image_size"], values.get("resize")
    check_sizes(size, resize)
    backbone = fitted(BackboneConfig(reading.backbone, width, embedding=reading.embedding()), size, size)
    if backbone.pooled_blocks is not None:
        assumed["pooled_blocks"] = backbone.pooled_blocks
    network = {
        "backbone": asdict(backbone),
        "image_shape": (channels, size, size),
        "mean": values["mean"],
        "std": values["std"],
        "image_size": size if resize else None,
        "channels_last": False,
        "similarity": values["similarity"],
        "resize": resize,
        "resize_mode": layout.resize_mode if resize else None,
    }
    settings = {
        "network": network,
        "config": {"similarity": values["similarity"], "scale": values["scale"]},
        "origin": {"layout": reading.layout, "assumed": assumed},
        **({"num_classes": len(head["weight"])} if head else {}),
    }
    told = ", ".join(f"{name} {value}" for name, value in assumed.items())
    sentence = f"read as {layout.title}: {reading.backbone}, {width} channels wide, images of {channels} channels"
    if told:
        sentence += f"; the file does not say, and assumed is: {told}"
    if layout.unsaid:
        sentence += f"; {layout.unsaid}"
    if unread := reading.unread():
        sentence += f"; weights of its method are passed over: {listed(unread)}"
    return Adopted(settings, _renamed(reading, values, head), sentence)


def known_layouts() -> str:
    """The titles of all layouts, in words."""
    return "; ".join(layout.title for layout in LAYOUTS.values())


def _recognized(content: Any) -> _Reading:
    readings = [
        _Reading(layout, backbone, prefix, state)
        for layout, description in LAYOUTS.items()
        for state in [plain_state(content, description.wrappers)]
        if state is not None
        for prefix in description.prefixes
        for backbone in description.backbones
    ]
    likeness = {reading[:3]: reading.likeness() for reading in readings}
    most = max(likeness.values(), default=0.0)
    if most < 0.5:
        raise ValueError(f"it fits no known layout: {_described(content)}. Known are: {known_layouts()}")
    nearest = [reading for reading in readings if likeness[reading[:3]] == most]
    if most < 1:
        first = nearest[0]
        names = (name for name in first.names().values() if not _is_counter(name))
        raise ValueError(f"{_is_taken_for(first)}, but {misfit(names, first.others())}")
    # Backbones may share their names and differ in their shapes.
    reading = min(nearest, key=lambda reading: len(reading.misshapen()))
    if misshapen := reading.misshapen():
        raise ValueError(f"{_is_taken_for(reading)} but for the shapes of {listed(misshapen)}")
    return reading


def _is_taken_for(reading: _Reading) -> str:
    return f"it is {LAYOUTS[reading.layout].title} with a {reading.backbone}"


def listed(names: list[str]) -> str:
    """The first few of them, and how many more there are, in words."""
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(name[:80] for name in names[:_NAMED_AT_MOST]) + more


def _described(content: Any) -> str:
    """The first keys of a file, and three of its weights with their shapes."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    parts = (content, *(part for part in content.values() if isinstance(part, dict)))
    weights = [(name, value) for part in parts for name, value in part.items() if isinstance(value, Tensor)]
    shown = ", ".join(f"{str(name)[:80]} {list(value.shape)}" for name, value in weights[:3])
    keys = listed([str(key) for key in content]) or "nothing"
    return f"it holds {keys}; {f'of its weights the first are {shown}' if weights else 'no weights'}"


def _is_counter(name: str) -> bool:
    return name.endswith(COUNTER)


def _head(reading: _Reading) -> dict[str, Tensor]:
    """The classifier over the base classes, empty where there is none."""
    place = LAYOUTS[reading.layout].head
    if place is None:
        return {}
    found = {leaf: reading.state[place + leaf] for leaf in ("weight", "bias") if place + leaf in reading.state}
    return found if "weight" in found and found["weight"].dim() == 2 and len(found["weight"]) else {}


def _resolve(
    layout: Layout, backbone: str, channels: int, head: Mapping[str, Tensor], given: CheckpointSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of all settings, and those that are assumed."""
    values, assumed = given.given(), {}
    if "mean" not in values and channels != len(layout.mean) and len({*layout.mean, *layout.std}) > 2:
        raise ValueError(
            f"mean and std: expected one number for each of the {channels} channels, which the file does not hold and "
            f"the code that wrote it has for {len(layout.mean)} only, got none"
        )
    defaults = {"image_size": layout.image_size(backbone)}
    for name in ("mean", "std"):
        own = getattr(layout, name)
        defaults[name] = own if len(own) == channels else own[:1] * channels
    if backbone not in layout.whole:
        defaults["resize"] = layout.resize(backbone, values.get("image_size", defaults["image_size"]))
    has_bias = "bias" in head
    # The file itself says it.
    told = has_bias and layout.linear_is_dot and given.similarity in (None, "dot")
    defaults["similarity"] = "dot" if told else "cosine"
    defaults["scale"] = layout.scale(backbone, values.get("similarity", defaults["similarity"]), has_bias)
    for name, value in defaults.items():
        if name not in values:
            values[name] = value
            # Without a classifier over base classes nothing asks for the scale of its loss.
            if not (told and name in ("similarity", "scale")) and (head or name != "scale"):
                assumed[name] = value
    return values, assumed


def _renamed(reading: _Reading, values: Mapping[str, Any], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name in ("mean", "std"):
        state[_PREPROCESSING + name] = torch.tensor(values[name], dtype=torch.float32).view(-1, 1, 1)
    place = BACKBONE if reading.embedding() is None else f"{BACKBONE}backbone."
    names = reading.names()
    weights = fresh_counters(names.values(), reading.state) | dict(reading.state)
    state |= {place + own: weights[other] for own, other in names.items()}
    if reading.embedding() is not None:
        state |= {BACKBONE + name: value for name, value in reading.projection().items()}
    return state | {HEAD + leaf: value for leaf, value in head.items()}
