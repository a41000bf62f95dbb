"""D_inter, D_intra and phi over the margin (the paper's Fig. 2), and the proposition of section 3.4 on them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fewshot_ext._precision import normalize
from fewshot_ext.experiments.accuracies import Row, select, values
from fewshot_ext.experiments.figures import draw_curves, figure, shared_legend
from fewshot_ext.experiments.measurements import TrainedRun
from fewshot_ext.experiments.measures import (
    MarginMeasures,
    base_class_probabilities,
    check_proposition,
    measure_discriminability,
    same_class_probability,
)
from fewshot_ext.experiments.runs import CLASSES, SweepImages, SweepRun
from fewshot_ext.experiments.tables import write_table, writer
from fewshot_ext.models.network import read_checkpoint
from fewshot_ext.training import PreTrainingConfig

NAME = "variance"
_QUANTITIES = {"inter": "$D_{inter}$", "intra": "$D_{intra}$", "ratio": r"$\phi = D_{inter} / D_{intra}$"}


@dataclass(frozen=True)
class VarianceMeasurement:
    """D_inter, D_intra and phi of every set of classes, and P^s of novel classes.

    Returns (a call):
        One row a set of classes, with columns classes, inter, intra and ratio, each with its interval; same_class (P^s)
        for all but base classes.
    """

    name: ClassVar[str] = "variance"

    def settings(self) -> dict[str, Any]:
        return {}

    def check(self, run: SweepRun, images: SweepImages) -> None:
        for classes, archive in images.test.items():
            if archive.num_classes < 3:
                raise ValueError(
                    f"{classes} classes of {run.data}: intervals need at least 3 classes, got {archive.num_classes}"
                )

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone, rows = trained.backbone(), []
        for classes, archive in trained.images.test.items():
            report(classes)
            features = trained.features(backbone, archive).cpu()
            row = {"classes": classes, **asdict(measure_discriminability(features, archive.labels))}
            if classes != "base":
                similarities, scale = base_similarities(trained.checkpoint, features)
                probabilities = base_class_probabilities(similarities, archive.labels, scale)
                row["same_class"] = same_class_probability(probabilities).mean().item()
            rows.append(row)
        return rows


def base_similarities(checkpoint: str | Path, features: Tensor) -> tuple[Tensor, float]:
    """Similarities of features to the classifier vectors of the pre-training, and its scale.

    Args:
        checkpoint: of a pre-training.
        features: ``[N, D]`` of its network, on the CPU.

    Returns:
        ``[N, base classes]`` cosines or inner products without margin and scale, and the scale.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: it is that of another training, which has no classifier over base classes.
    """
    content = read_checkpoint(checkpoint)
    config, weight = content["hyper_parameters"]["config"], content["state_dict"].get("head.weight")
    if weight is None:
        raise ValueError(
            f"{Path(checkpoint).name} is a checkpoint of the wrong kind: it holds no classifier over base classes, "
            "which the probabilities of eq. 5 need"
        )
    if PreTrainingConfig.from_dict(config).similarity == "cosine":
        features, weight = normalize(features), normalize(weight)
    return features @ weight.T, config["scale"]


def check_propositions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The proposition for every two neighboring margins of every loss and seed.

    Returns:
        One row a pair, with columns loss, seed, margin and larger_margin, those of ``PropositionCheck``, and
        novel_intra beside modeled_novel_intra, what the proof takes it to be, at the larger margin.
    """
    found = []
    for loss in values(rows, "loss"):
        for seed in values(select(rows, loss=loss), "seed"):
            of_seed = select(rows, loss=loss, seed=seed)
            measures = [_measures(select(of_seed, margin=margin)) for margin in values(of_seed, "margin")]
            for smaller, larger in pairwise(measures):
                found.append(
                    {
                        "loss": loss,
                        "seed": seed,
                        "margin": smaller.margin,
                        "larger_margin": larger.margin,
                        **asdict(check_proposition(smaller, larger)),
                        "novel_intra": larger.novel_intra,
                        "modeled_novel_intra": larger.modeled_novel_intra,
                    }
                )
    return found


def write_variance(folder: Path, rows: Sequence[Row], **head: Any) -> list[Path]:
    """Writes ``variance.json``, ``.csv`` and ``.png``, and ``proposition.json`` and ``.csv`` for pairs of margins.

    Args:
        folder: must exist.
        rows: of ``Sweep.run`` with ``VarianceMeasurement``.
        head: what is needed to repeat the analysis.
    """
    written = writer(NAME, plot_variance)(folder, rows, **head)
    if propositions := check_propositions(rows):
        written += write_table(folder, "proposition", propositions, **head)
    return written


def plot_variance(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the three quantities over the margin, a curve a set of classes, the mean over seeds."""
    losses = values(rows, "loss")
    with figure(path, rows=len(_QUANTITIES), columns=len(losses), height=1.8, sharex="col") as axes:
        for j, loss in enumerate(losses):
            of_loss = select(rows, loss=loss)
            for i, (name, symbol) in enumerate(_QUANTITIES.items()):
                curves = {
                    f"{classes} classes": [
                        _mean_over_seeds(select(of_loss, classes=classes, margin=margin), name)
                        for margin in values(of_loss, "margin")
                    ]
                    for classes in CLASSES
                    if select(of_loss, classes=classes)
                }
                draw_curves(
                    axes[i, j],
                    curves,
                    title=f"{loss}" if len(losses) > 1 and not i else "",
                    x="margin $m$" if i == len(_QUANTITIES) - 1 else "",
                    y=symbol,
                    legend=False,
                )
        shared_legend(axes[0, 0])


def _mean_over_seeds(rows: Sequence[Row], name: str) -> tuple[float, float, float]:
    # Seeds share the classes, whose draw the interval is about: their mean is as wide as one of them.
    means = [sum(row[key] for row in rows) / len(rows) for key in (name, f"{name}_interval")]
    return rows[0]["margin"], *means


def _measures(rows: Sequence[Row]) -> MarginMeasures:
    (base,), (novel,) = select(rows, classes="base"), select(rows, classes="novel")
    return MarginMeasures(
        base["margin"], base["inter"], base["intra"], novel["inter"], novel["intra"], novel["same_class"]
    )
