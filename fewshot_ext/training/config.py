"""Typed settings of pre-training: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fewshot_ext._formats import nested, typed
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_positive,
    check_similarity,
    plain_numbers,
)
from fewshot_ext.data.augmentation import AugmentationConfig, check_sizes
from fewshot_ext.data.pictures import RESIZES
from fewshot_ext.heads.names import HeadChoice, choose_head
from fewshot_ext.models import BackboneConfig
from fewshot_ext.ops.margin_softmax import DEFAULTS

# Settings that one optimizer alone has.
_OPTIMIZERS = {
    "adam": ("minimum_learning_rate", "warmup", "warmup_multiplier"),
    "sgd": ("momentum", "nesterov", "decay", "decay_epochs"),
}

# The four losses of the paper's table 3, each with its similarity.
LOSSES = {"neg-cosine": "cosine", "neg-softmax": "dot", "cosine": "cosine", "softmax": "dot"}


@dataclass(frozen=True)
class ValidationConfig:
    """Episodes of validation classes, from which the best checkpoint is chosen.

    Args:
        head: classifier of the episodes, by its name in evaluate; null takes the head that meta-training trains and,
            after pre-training, protonet_cosine: it has no training of its own, so that hundreds of episodes take
            seconds, and it ranks epochs of one backbone as the fine-tuned classifier does.
        epochs: number of epochs between two validations; the last epoch is always validated.
        episodes: number of episodes, the same ones at every validation.
        way: number of classes in an episode.
        shot: number of support images of each class.
        queries: number of query images of each class.

    Raises:
        ValueError: a value out of range, an unknown head, or one that needs the mean feature of the base classes; the
            message names it.
    """

    head: str | None = None
    epochs: int = 20
    episodes: int = 600
    way: int = 5
    shot: int = 5
    queries: int = 16

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name, least in (("epochs", 1), ("episodes", 1), ("way", 2), ("shot", 1), ("queries", 1)):
            check_count(name, getattr(self, name), least)
        if self.head is None:
            return
        # Under its whole name, because meta-training has a head of its own.
        try:
            head = choose_head(self.head).head
        except ValueError as error:
            raise ValueError(f"validation.head: {str(error).removeprefix('head: ')}") from error
        if head.needs_base_mean:
            raise ValueError(
                f"validation.head: expected one without need of the mean feature of the base classes, got {self.head!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that every training has.

    Args:
        precision: arithmetic of the network, by Lightning's name; losses and matching are in float32 or better.
        channels_last: keep feature maps in the channels-last layout, in which most convolutions are faster.
        checkpoint_epochs: number of epochs between two checkpoints; an interrupted run resumes from the last of them.
        image_size: side of the square images that the backbone sees; null takes the size of the stored images.
        resize: side that images are brought to before the middle of image_size is cut out, in evaluation and in
            training without random crops; null takes 1.15 times image_size.
        resize_mode: how images become square there, and the picture files that the trained network is given: stretch,
            or crop, which keeps their shape; null stretches images and crops files. Take that of data pack.
        mean: mean of each channel for pixels in [0, 1]; null takes that of the training images.
        std: standard deviation of each channel; null takes that of the training images.
        augmentation: see ``AugmentationConfig``.
    """

    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    channels_last: bool = False
    checkpoint_epochs: int = 1
    image_size: int | None = None
    resize: int | None = None
    resize_mode: Literal["crop", "stretch"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("precision", self.precision, "32-true", "16-mixed", "bf16-mixed", "64-true")
        check_count("checkpoint_epochs", self.checkpoint_epochs, 1)
        check_sizes(self.image_size, self.resize)
        if self.resize_mode is not None:
            check_choice("resize_mode", self.resize_mode, *RESIZES)
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std: expected both or neither, got {self.mean} and {self.std}")
        for name, values, check in (("mean", self.mean, check_number), ("std", self.std, check_positive)):
            for value in values or ():
                check(name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it, or from a YAML file."""
        return typed(cls, values)


@dataclass(frozen=True)
class PreTrainingConfig(TrainingConfig):
    """Pre-training on base classes with a signed-margin softmax (paper eq. 1, 7, 8).

    The defaults are the paper's recipe for Neg-Cosine on CUB. Those of sgd are of the pre-training of DeepEMD, whose
    other settings are a rate of 0.1 and, for a plain softmax, margin 0 and scale 1 of the inner product.

    Args:
        similarity: "cosine" (Neg-Cosine) or "dot" (inner product, Neg-Softmax).
        margin: subtracted from the similarity with the true class; negative loosens, positive tightens.
        scale: multiplies the similarities before the softmax (the paper: 30 for cosine, 5 for the inner
            product).
        label_smoothing: share of the target that is spread over all classes.
        head_classes: number of classes that the loss tells apart; null takes the base classes. What there are more of
            are classes without images. The official code has 200 for the 100 base classes of CUB.
        epochs: number of passes over the base images.
        batch_size: number of images in a step, over all devices.
        optimizer: adam (linear warm-up, then cosine decay) or sgd (the learning rate falls in steps).
        learning_rate: learning rate at the end of Adam's warm-up, or in SGD's first epochs.
        minimum_learning_rate: learning rate at the end of the cosine decay (adam only).
        warmup: share of the steps in the linear warm-up (adam only; the paper: 50 of 200 epochs, 100 of 400).
        warmup_multiplier: how many times smaller the first learning rate is than that after the warm-up (adam only).
        momentum: momentum (sgd only).
        nesterov: use Nesterov's momentum (sgd only).
        decay: factor that the learning rate is multiplied by at each decay (sgd only).
        decay_epochs: number of epochs between two decays (sgd only).
        weight_decay: factor of the L2 penalty that the optimizer adds to the gradient.
        compile: compile the backbone by torch.compile; the first steps then take minutes.
        backbone: see ``BackboneConfig``.
        validation: see ``ValidationConfig``.

    Raises:
        ValueError: a value out of range, or a setting of the other optimizer; the message names it.

    Reference:
        Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, ECCV 2020, section 3.5;
        with sgd Zhang et al., DeepEMD, CVPR 2020, and its official implementation.

    Example:
        >>> deepemd = PreTrainingConfig.for_loss("softmax", scale=1.0, optimizer="sgd", learning_rate=0.1, epochs=120)
        >>> deepemd.decay, deepemd.decay_epochs
        (0.2, 30)
    """

    similarity: Literal["cosine", "dot"] = "cosine"
    margin: float = -0.3
    scale: float = 30.0
    label_smoothing: float = 0.0
    head_classes: int | None = None
    epochs: int = 200
    batch_size: int = 256
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 3e-3
    minimum_learning_rate: float = 1e-6
    warmup: float = 0.25
    warmup_multiplier: float = 16.0
    momentum: float = 0.9
    nesterov: bool = True
    decay: float = 0.2
    decay_epochs: int = 30
    weight_decay: float = 0.0
    compile: bool = False
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "similarity", check_similarity(self.similarity))
        check_number("margin", self.margin)
        check_positive("scale", self.scale)
        check_fraction("label_smoothing", self.label_smoothing)
        if self.head_classes is not None:
            check_count("head_classes", self.head_classes, 2)
        check_count("epochs", self.epochs, 1)
        check_count("batch_size", self.batch_size, 2)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("minimum_learning_rate", self.minimum_learning_rate, 0)
        check_fraction("warmup", self.warmup)
        check_at_least("warmup_multiplier", self.warmup_multiplier, 1)
        check_fraction("momentum", self.momentum)
        check_positive("decay", self.decay)
        check_count("decay_epochs", self.decay_epochs, 1)
        self._check_optimizer()
        check_at_least("weight_decay", self.weight_decay, 0)

    def _check_optimizer(self) -> None:
        check_choice("optimizer", self.optimizer, *_OPTIMIZERS)
        default = {own.name: own.default for own in fields(self)}
        for optimizer, names in _OPTIMIZERS.items():
            for name in names:
                came = getattr(self, name)
                if optimizer != self.optimizer and came != default[name]:
                    raise ValueError(f"{name} is an option of optimizer {optimizer}, got {came} for {self.optimizer}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected false without momentum, got momentum 0")

    @property
    def validation_head(self) -> tuple[str, HeadChoice]:
        """What classifies validation episodes, and its name."""
        name = self.validation.head or "protonet_cosine"
        return name, choose_head(name, similarity=self.similarity)

    @property
    def loss(self) -> str:
        """The loss without regard to its margin: "cosine" or "softmax"."""
        return "cosine" if self.similarity == "cosine" else "softmax"

    @classmethod
    def for_loss(
        cls, loss: str, *, margin: float | None = None, scale: float | None = None, **settings: Any
    ) -> "PreTrainingConfig":
        """Settings for a loss by its name in the paper.

        Args:
            loss: "neg-cosine", "neg-softmax", "cosine" or "softmax"; the last two are the first two with margin 0.
            margin: the losses' own default for the first two where None, -0.3 and -1; absent or 0 for the last two.
            scale: the paper's where None: 30 for cosines, 5 for inner products and 10 for those of ResNet-12.
            settings: the other fields; nested ones may be dictionaries, as a YAML file gives them.

        Raises:
            ValueError: an unknown loss, or a margin that does not go with it.

        Example:
            >>> PreTrainingConfig.for_loss("softmax").scale
            5.0
        """
        check_choice("loss", loss, *LOSSES)
        settings = nested(cls, settings)
        if loss.startswith("neg-"):
            margin = DEFAULTS[LOSSES[loss]][0] if margin is None else margin
        elif margin:
            raise ValueError(f"margin: expected 0 for loss {loss!r}, got {margin}; loss 'neg-{loss}' takes any")
        if scale is None:
            backbone = settings.get("backbone", BackboneConfig())
            scale = 10.0 if (LOSSES[loss], backbone.name) == ("dot", "resnet12") else DEFAULTS[LOSSES[loss]][1]
        return cls(similarity=LOSSES[loss], margin=margin or 0.0, scale=scale, **settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PreTrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it, of version 0.1 too."""
        if values.get("similarity") == "softmax":
            values = {**values, "similarity": "dot"}
        return super().from_dict(values)
