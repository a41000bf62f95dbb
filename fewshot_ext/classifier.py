"""Few-shot classification of one's own images, in the style of scikit-learn."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_ext._formats import misfits_named, typed
from fewshot_ext._validation import check_count, check_positive
from fewshot_ext.classifier_assessment import Assessment, check_assessment
from fewshot_ext.classifier_file import (
    check_label,
    check_learned,
    head_content,
    read_classifier,
    rebuild_head,
    write_classifier,
)
from fewshot_ext.classifier_labels import check_one_each, labeled, sorted_if_possible
from fewshot_ext.data.pictures import MAX_PIXELS
from fewshot_ext.evaluation.backbones import FrozenBackbone, state_checksum
from fewshot_ext.evaluation.images import ImageBatches
from fewshot_ext.evaluation.protocol import extract_features
from fewshot_ext.heads.conformal import PValues, leave_one_out
from fewshot_ext.heads.names import HeadChoice, HeadSettings, choose_head, crops_an_image
from fewshot_ext.heads.vectors import FineTuning, Head
from fewshot_ext.models import LocalFeaturesConfig, Network
from fewshot_ext.models.network import DEFAULT, rebuild_network

_LOCAL_FEATURES = LocalFeaturesConfig()
# Side of the images that a file may ask for, and of one that is worth a trial when it is loaded.
_LARGEST_IMAGE, _LARGEST_TRIAL = math.isqrt(MAX_PIXELS), 512
# Scores of this many queries against thousands of support images still fit in a few hundred megabytes. Maps take more,
# and a head that is fitted for every call takes as many queries as there is room for.
_QUERIES_AT_ONCE = 4096
_BYTES_AT_ONCE = 2**28


class FewShotClassifier:
    """Learns classes from a few images each, on the frozen features of a backbone.

    Images are a uint8 tensor ``[N, C, H, W]``, a float tensor of that shape in [0, 1], an array ``[N, H, W]`` or
    ``[N, H, W, C]`` of either kind; a file, a folder, a pattern such as ``photos/*.jpg`` or a PIL image; or a list of
    files, PIL images, arrays ``[H, W]`` or ``[H, W, C]`` and tensors ``[C, H, W]``. Floats are rounded to the 256
    levels of picture files. Files, and what is in a list, are brought to a square of ``image_size`` as the network's
    ``resize_mode`` says: by default the short side is resized to it and the middle cut out. Gray is turned to color,
    or color to gray, as the backbone needs. Labels may be of any hashable kind, classes may have any number of images,
    one included, and different numbers.

    Args:
        backbone: "default", an EfficientNet-Lite0 of ImageNet, whose weights the extra ``pretrained`` brings; or a
            module that maps images to features ``[B, D]``; or the path of a checkpoint of any training, which brings
            its preprocessing, or of other code; or the name of a model of timm; or what
            ``fewshot_ext.models.load_network`` made of one of these.
        head: the classifier, by its name in ``fewshot_ext.heads.HEADS`` or as a ``Head`` with settings of your
            own. "finetune" goes on with the similarity that the backbone was pre-trained with. Those of ``MAP_HEADS``,
            such as "deepemd" or "deepemd@grid", look at regions of the images; see ``choose_head``. The backbone must
            then give feature maps, by a method ``feature_map``; all backbones of this package do, and convolutional
            networks and transformers of timm.
        preprocessing: for a module: maps ``[B, C, H, W]`` uint8 images to its input, as ``ImageInput`` does; by
            default they are scaled to [0, 1].
        image_size: side that picture files are brought to; by default what the backbone was trained with.
        device: where features and scores are computed; None leaves a module where it is.
        batch_size: images a forward pass.
        seed: decides what is random in the head; predictions of the same images are the same.
        base_mean: ``[D]`` mean feature of the base classes, for the head "simpleshot".
        local_features: the regions that a head for maps looks at; those that its name names have priority.
        temperature: divides the logits of ``predict_proba``; ``evaluate --split validation`` finds the one that
            calibrates a head.

    Attributes:
        classes_: the labels, in the order of the columns of ``predict_proba``: sorted where they can be, and those
            that ``partial_fit`` adds behind them.

    Raises:
        ImportError: the backbone is a name, and timm or the extra ``pretrained`` is missing.
        OSError: the checkpoint cannot be read.
        TypeError: a backbone or a head of another kind, or a backbone without feature maps for a head that takes maps.
        ValueError: an unknown head or backbone, a head without the ``base_mean`` that it needs, or a number out of
            range.

    Example:
        >>> images = torch.tensor([0, 10, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 8, 8)
        >>> classifier = FewShotClassifier(nn.Flatten(), head="protonet")
        >>> classifier.fit(images[1:3], ["dark", "bright"]).predict(images)
        ['dark', 'dark', 'bright', 'bright']
        >>> FewShotClassifier(nn.Flatten(), head="protonet").fit(images, [0, 0, 1, 1]).predict(images // 2, reject=0.3)
        [0, 0, None, None]
        >>> classifier.partial_fit(images[3:], ["white"]).classes_
        ('bright', 'dark', 'white')
        >>> classifier.score(images, ["dark", "dark", "bright", "white"])
        1.0
    """

    classes_: tuple[Hashable, ...]

    def __init__(
        self,
        backbone: FrozenBackbone | Network | nn.Module | str | Path = DEFAULT,
        head: str | Head = "finetune",
        *,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        image_size: int | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        base_mean: Tensor | None = None,
        local_features: LocalFeaturesConfig = _LOCAL_FEATURES,
        temperature: float = 1.0,
    ) -> None:
        batch_size, seed = check_count("batch_size", batch_size, 1), check_count("seed", seed, 0)
        self.temperature = check_positive("temperature", temperature)
        if image_size is not None:
            image_size = check_count("image_size", image_size, 1)
        if not isinstance(head, str | Head):
            raise TypeError(f"head: expected a name or a Head, got {type(head).__name__}")
        settings = HeadSettings(local_features=local_features)
        if isinstance(head, str):
            choice = choose_head(head, settings)
        else:
            choice = HeadChoice(head, local_features if head.takes_maps else None)
        chosen = choice.head
        if chosen.needs_base_mean and base_mean is None:
            name = type(chosen).__name__
            raise ValueError(
                f"base_mean: expected a value for {name}, which subtracts it, got none; 'simpleshot_l2n' does without"
            )
        self.backbone = FrozenBackbone.open(backbone, preprocessing)
        if device is not None:
            self.backbone.network.to(device)
        if head == "finetune":
            chosen = FineTuning(similarity=self.backbone.network.similarity)
        self.local_features, self._extractor = choice.local_features, self.backbone.network
        if choice.local_features is not None:
            self._extractor = self.backbone.network.local_features(choice.local_features)
        self.head, self.batch_size, self.seed, self.base_mean = chosen, batch_size, seed, base_mean
        self.image_size = image_size or self.backbone.network.image_size
        self._forget()

    def fit(
        self,
        images: Any,
        labels: Iterable[Hashable] | None = None,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> "FewShotClassifier":
        """Learns the classes of ``images``; what was learned before is forgotten.

        Args:
            images: see the class. A folder must hold one folder of pictures for each class.
            labels: one an image; left out where ``images`` is a folder, whose sub-folders name the classes as in
                ``fewshot_ext.data.read_folder``. What is passed over there is told by a warning.
            on_progress: called with the number of images done so far.

        Returns:
            The classifier itself.

        Raises:
            ImportError: files are given and Pillow is missing.
            OSError: a file or folder is missing.
            TypeError: images of another kind or dtype, or a label that is not hashable.
            ValueError: no images, a wrong shape, floats outside [0, 1], another number of labels than of images,
                a damaged file, images that the backbone does not take, features that are not finite, or fewer local
                features than the head needs. What was learned before is kept then.
        """
        return self._learn(images, labels, on_progress, keep=False)

    def partial_fit(
        self,
        images: Any,
        labels: Iterable[Hashable] | None = None,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> "FewShotClassifier":
        """Adds images of new classes, or more images of known ones, to what was learned; otherwise as ``fit``."""
        return self._learn(images, labels, on_progress, keep=True)

    def decision_function(self, images: Any, *, on_progress: Callable[[int], None] | None = None) -> Tensor:
        """The scores of the head, ``[N, classes]`` float32 on the CPU; see ``Head`` for what they mean.

        Raises:
            RuntimeError: ``fit`` has not been called.
            ValueError: only one class is known; further errors are those of ``fit``.
        """
        self._check_ready()
        support, target = self._condensed()
        return torch.cat([self._scores(part, support, target) for part in self._queries(images, on_progress)]).cpu()

    def predict_proba(self, images: Any, *, on_progress: Callable[[int], None] | None = None) -> Tensor:
        """Shares that add up to 1, ``[N, classes]`` float32 on the CPU, columns in the order of ``classes_``.

        They are the softmax of the head's scores times its ``scale`` over ``temperature`` (``Head.probabilities``).
        With the temperature 1 they are for "finetune" the probabilities that its training maximizes, for "protonet"
        and "matchingnet" those of their papers. None of these has been calibrated on data: take them to rank images,
        not as the chance of being right. A temperature from episodes of other classes brings them closer to it, for as
        many classes and images a class as those episodes had.

        Raises:
            As ``decision_function``.
        """
        return self.head.probabilities(self.decision_function(images, on_progress=on_progress), self.temperature)

    def predict(
        self, images: Any, *, reject: float | None = None, on_progress: Callable[[int], None] | None = None
    ) -> list[Hashable]:
        """The most probable label of each image, or None for an image of no known class.

        Args:
            images: see the class.
            reject: level in (0, 1): the share of images of known classes that may be called None. An image is where its
                p-value (``p_values.known`` of ``assess``) is at most the level. With S support images the finest level
                is 1 / (S + 1). None, the default, finds a class for every image.
            on_progress: called with the number of images done so far.

        Raises:
            ValueError: for ``reject``, a level out of range or finer than the finest, a class with one support image,
                or one that is called None; further errors are those of ``decision_function``.
        """
        if reject is None:
            scores = self.decision_function(images, on_progress=on_progress)
            return [self.classes_[index] for index in scores.argmax(1).tolist()]
        self._check_ready()
        check_assessment(self.classes_, self._target, reject=reject)
        return self.assess(images, on_progress=on_progress).predict(reject)

    def predict_set(
        self, images: Any, *, level: float = 0.9, on_progress: Callable[[int], None] | None = None
    ) -> list[tuple[Hashable, ...]]:
        """The labels that each image may have, in the order of ``classes_``: a set that holds the true one mostly.

        Of images of known classes that are drawn as the support images are, ``2 * level - 1`` at least and mostly about
        ``level`` have their label in its set, on average over support sets; see ``fewshot_ext.heads.leave_one_out``.
        Sets are empty where no class fits, and large where the head cannot decide.

        Args:
            images: see the class.
            level: the coverage, in (0, 1), with S support images at most S / (S + 1).
            on_progress: called with the number of images done so far.

        Raises:
            ValueError: a level out of range, or a class with one support image; further errors are those of
                ``decision_function``.
        """
        self._check_ready()
        check_assessment(self.classes_, self._target, level=level)
        return self.assess(images, on_progress=on_progress).predict_set(level)

    def assess(self, images: Any, *, on_progress: Callable[[int], None] | None = None) -> Assessment:
        """Probabilities and p-values of images in one pass, for ``predict`` and ``predict_set`` at any level.

        Raises:
            ValueError: a class with one support image; further errors are those of ``decision_function``.
        """
        self._check_ready()
        check_assessment(self.classes_, self._target)
        support, target = self._condensed()
        learned = [x.to(support.device) for x in (self._support, self._target)]
        settings = {"base_mean": self.base_mean, "temperature": self.temperature, "seed": self.seed}
        scores, known, labels = [], [], []
        for part in self._queries(images, on_progress):
            scores.append(self._scores(part, support, target))
            values = leave_one_out(self.head, *learned, part, len(self.classes_), **settings)
            known.append(values.known)
            labels.append(values.labels)
        probabilities = self.head.probabilities(torch.cat(scores).cpu(), self.temperature)
        return Assessment(probabilities, PValues(torch.cat(known), torch.cat(labels)), self.classes_)

    def score(self, images: Any, labels: Iterable[Hashable] | None = None) -> float:
        """The share of images whose label is predicted, in [0, 1]; ``labels`` as in ``fit``.

        Raises:
            As ``decision_function``.
        """
        images, labels = labeled(images, labels)
        batches = self._batches(images)
        check_one_each(len(batches), labels)
        predicted = self.predict(batches)
        return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)

    def save(self, path: str | Path) -> None:
        """Writes the classifier to a file, whole or not at all. No code is in it.

        A backbone that comes from a checkpoint or from timm goes in with its weights, so that the file is enough to
        predict. Of a module of your own goes in a checksum of its weights, and ``load`` asks for the module.

        Raises:
            OSError: the file cannot be written.
            RuntimeError: ``fit`` has not been called.
            TypeError: a label that is no text, number, boolean, None or tuple of these, or a head that is not one of
                this package.
        """
        if not self.classes_:
            raise RuntimeError("this classifier has learned nothing yet: call fit first")
        for label in self.classes_:
            check_label(label)
        content = {
            "head": head_content(self.head),
            "local_features": None if self.local_features is None else asdict(self.local_features),
            "classes": list(self.classes_),
            "features": self._support.cpu(),
            "target": self._target.cpu(),
            "base_mean": None if self.base_mean is None else self.base_mean.cpu(),
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "temperature": self.temperature,
            "backbone": self.backbone.network.content() or {"sha256": state_checksum(self.backbone.network)},
        }
        write_classifier(Path(path).expanduser(), content)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backbone: nn.Module | None = None,
        *,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> "FewShotClassifier":
        """The classifier in a file that ``save`` wrote; it is read without running code in it.

        Args:
            path: the file.
            backbone: the module that it was saved with, where that was a module of your own.
            preprocessing: the one it was saved with, for such a module.
            device: as in the constructor.

        Raises:
            ImportError: the backbone is one of timm, and timm is missing.
            OSError: the file cannot be read.
            ValueError: it holds no classifier, is damaged, or needs a backbone that is not given, is given although
                it has its own, or has other weights than the one it was saved with.
        """
        content = read_classifier(Path(path).expanduser())
        origin = content["backbone"]
        own = origin.keys() == {"sha256"}
        if own and backbone is None:
            raise ValueError(f"backbone: expected the module that {path} was saved with, got none")
        if not own and (backbone is not None or preprocessing is not None):
            raise ValueError(f"backbone and preprocessing: expected none, for {path} holds its own")
        misfit = f"{path} does not hold a FewShotClassifier that fits this version of fewshot_ext"
        if own:
            source = FrozenBackbone.open(backbone, preprocessing)
            if state_checksum(source.network) != origin["sha256"]:
                raise ValueError(f"backbone: expected the weights that {path} was saved with, got others")
        else:
            with misfits_named(misfit):
                source = rebuild_network(origin)
        with misfits_named(misfit):
            settings = {name: content[name] for name in ("image_size", "batch_size", "seed", "base_mean")}
            settings["temperature"] = content.get("temperature", 1.0)
            if content.get("local_features") is not None:
                settings["local_features"] = typed(LocalFeaturesConfig, content["local_features"])
            classifier = cls(source, rebuild_head(content["head"]), device=device, **settings)
            classifier.classes_ = tuple(content["classes"])
            classifier._support, classifier._target = content["features"], content["target"]
            classifier._check_learned()
        return classifier

    def _check_learned(self) -> None:
        """Raises ValueError unless what was learned, as a file has it, is what ``fit`` leaves."""
        support, target = self._support, self._target
        check_learned(support, target, self.classes_, "[S, D]" if self.local_features is None else "[S, N, C]")
        for name, most in (("batch_size", 2**63 - 1), ("seed", 2**63 - 1), ("image_size", _LARGEST_IMAGE)):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name}: expected at most {most}")
        mean = self.base_mean
        if mean is not None and (not mean.is_floating_point() or mean.shape != support.shape[-1:]):
            raise ValueError(f"base_mean: expected floats [{support.shape[-1]}], got {mean.dtype} {list(mean.shape)}")
        if self.head.takes_maps:
            self.head.check_regions(int(target.bincount().min()) * support.shape[1])
        if self.backbone.network.channels and self.image_size and self.image_size <= _LARGEST_TRIAL:
            # The weights in the file make features of some size, and those in it must have it too.
            image = torch.zeros(1, self.backbone.network.channels, self.image_size, self.image_size, dtype=torch.uint8)
            self._check_size(next(self._features(self._batches(image), None)))

    def _forget(self) -> None:
        self.classes_ = ()
        self._support, self._target = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        self._fitted: tuple[Tensor, Tensor] | None = None

    def _learn(self, images: Any, labels, on_progress, *, keep: bool) -> "FewShotClassifier":
        images, labels = labeled(images, labels)
        batches = self._batches(images)
        check_one_each(len(batches), labels)
        known = self.classes_ if keep else ()
        old = set(known)
        classes = known + tuple(sorted_if_possible(label for label in labels if label not in old))
        index = {label: number for number, label in enumerate(classes)}
        target = torch.tensor([index[label] for label in labels])
        features = torch.cat([part.cpu() for part in self._features(batches, on_progress)])
        if known:
            self._check_size(features)
            features, target = torch.cat([self._support, features]), torch.cat([self._target, target])
        if self.head.takes_maps:
            self.head.check_regions(int(target.bincount().min()) * features.shape[1])
        self.classes_, self._support, self._target, self._fitted = classes, features, target, None
        if len(classes) > 1:
            self._condensed()
        return self

    def _batches(self, images: Any) -> ImageBatches:
        return ImageBatches(
            images,
            channels=self.backbone.network.channels,
            image_size=self.image_size,
            batch_size=self.batch_size,
            resize_mode=self.backbone.network.resize_mode,
        )

    def _features(self, batches: ImageBatches, on_progress: Callable[[int], None] | None) -> Iterator[Tensor]:
        """Feature vectors ``[B, D]`` or maps ``[B, N, C]``, batch by batch."""
        done = 0
        at_once = self.batch_size
        if self.local_features is not None:
            at_once = max(1, at_once // crops_an_image(self.local_features))
        for batch in batches:
            try:
                features = extract_features(self._extractor, batch, batch_size=at_once)
            except (RuntimeError, TypeError, ValueError) as error:
                shape = "x".join(map(str, batch.shape[1:]))
                raise ValueError(f"the backbone does not take images of {shape}: {error}") from error
            layout = "[B, D]" if self.local_features is None else "[B, N, C]"
            if features.dim() != len(layout.split(",")):
                raise ValueError(f"backbone: expected features {layout}, got {list(features.shape)}")
            if not features.isfinite().all():
                raise ValueError("the backbone gives features that are not finite")
            yield features
            done += len(batch)
            if on_progress:
                on_progress(done)

    def _check_size(self, features: Tensor) -> None:
        """Backbones without a global pooling give more features for larger images."""
        came, learned = (" x ".join(map(str, x.shape[1:])) for x in (features, self._support))
        if came != learned:
            raise ValueError(
                f"images: expected the size of those learned: they give {came} features, those gave {learned}"
            )

    def _condensed(self) -> tuple[Tensor, Tensor]:
        """The support set ``[1, S, ...]`` that queries are held against, and its classes, on the device of features."""
        if self._fitted is None:
            device = next(chain(self._extractor.parameters(), self._extractor.buffers()), self._support).device
            support, target = (x.to(device).unsqueeze(0) for x in (self._support, self._target))
            if self.head.takes_maps:
                support, target = self.head.condense(
                    support, target, len(self.classes_), generator=torch.Generator().manual_seed(self.seed)
                )
            self._fitted = support, target
        return self._fitted

    def _check_ready(self) -> None:
        if not self.classes_:
            raise RuntimeError("this classifier has learned nothing yet: call fit first")
        if len(self.classes_) < 2:
            raise ValueError(f"classes: expected at least two, and only {self.classes_[0]!r} is known")

    def _queries(self, images: Any, on_progress: Callable[[int], None] | None) -> Iterator[Tensor]:
        """Features as the head wants queries, so many at a time as should be scored together."""
        batches, waiting, some = images if isinstance(images, ImageBatches) else self._batches(images), [], False
        for features in self._features(batches, on_progress):
            self._check_size(features)
            waiting.append(self.head.condense_queries(features) if self.head.takes_maps else features)
            if self._is_enough(waiting):
                yield torch.cat(waiting)
                waiting, some = [], True
        if waiting:
            yield torch.cat(waiting)
        elif not some:
            raise ValueError("images: expected at least one picture that can be read")

    def _is_enough(self, waiting: Sequence[Tensor]) -> bool:
        """Whether so many queries wait that they should be scored."""
        size, count = sum(part.nbytes for part in waiting), sum(map(len, waiting))
        if self.head.fits:
            return size >= _BYTES_AT_ONCE
        return count >= _QUERIES_AT_ONCE or (self.head.takes_maps and size >= _BYTES_AT_ONCE)

    def _scores(self, query: Tensor, support: Tensor, target: Tensor) -> Tensor:
        at_once = max(1, len(query)) if self.head.fits else _QUERIES_AT_ONCE
        return torch.cat(
            [
                self.head(
                    support,
                    target,
                    part.unsqueeze(0),
                    len(self.classes_),
                    base_mean=self.base_mean,
                    # The same for every part, so that an image's scores do not depend on its neighbors.
                    generator=torch.Generator().manual_seed(self.seed),
                )[0]
                for part in query.split(at_once)
            ]
        )
