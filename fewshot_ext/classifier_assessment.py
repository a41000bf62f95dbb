"""What a classifier finds out about images: probabilities, p-values, and the labels that follow from them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import compress

from torch import Tensor

from fewshot_ext.heads.conformal import PValues, check_coverage, check_leaving_one_out, check_reject


@dataclass(frozen=True, eq=False)
class Assessment:
    """What ``FewShotClassifier.assess`` finds out about N images, on the CPU.

    Attributes:
        probabilities: ``[N, classes]`` float32, as ``predict_proba`` gives them.
        p_values: how well the images fit to the support set: ``known`` ``[N]`` of any class, ``labels``
            ``[N, classes]`` of each; see ``fewshot_ext.heads.leave_one_out``.
        classes: the labels, in the order of the columns.
    """

    probabilities: Tensor
    p_values: PValues
    classes: tuple[Hashable, ...]

    def predict(self, reject: float) -> list[Hashable]:
        """What ``FewShotClassifier.predict`` says at this level of rejection."""
        best, rejected = self.probabilities.argmax(1).tolist(), self.p_values.rejected(reject).tolist()
        return [None if none else self.classes[index] for index, none in zip(best, rejected, strict=True)]

    def predict_set(self, level: float) -> list[tuple[Hashable, ...]]:
        """What ``FewShotClassifier.predict_set`` says at this level."""
        return [tuple(compress(self.classes, chosen)) for chosen in self.p_values.sets(level).tolist()]


def check_assessment(
    classes: Sequence[Hashable], target: Tensor, *, reject: float | None = None, level: float | None = None
) -> None:
    """Raises ValueError unless images can be assessed, and the levels are possible.

    Args:
        classes: the labels of the support set, at least 2.
        target: ``[S]`` int64, the class of each support image.
        reject: as in ``FewShotClassifier.predict``.
        level: as in ``FewShotClassifier.predict_set``.
    """
    check_leaving_one_out(dict(zip(classes, target.bincount(minlength=len(classes)).tolist(), strict=True)))
    if reject is not None:
        check_reject(reject, len(target))
        if None in classes:
            raise ValueError("reject: expected no class that is called None, which is what rejected images get")
    if level is not None:
        check_coverage(level, len(target))
