"""The page of the negative-margin paper: its claims held against the results files of ``fewshot-ext analyze``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr
from verdicts import (
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    Finding,
    findings_markdown,
    gain_text,
    judge,
    picture_markdown,
    read_table,
    sign_of,
    source_markdown,
)

from fewshot_ext.experiments.accuracies import Difference, Row, difference, mean_accuracy, select, values
from fewshot_ext.experiments.figures import LOSS_TITLES
from fewshot_ext.experiments.variants import WITHOUT_MARGIN

# The analyses, each with the caption of its picture. An analysis, its picture and its first results file share a name.
CAPTIONS = {
    "margins": "Fig. 1 and 6: accuracy over the pre-training margin.",
    "variance": "Fig. 2: variances over the margin, with jackknife intervals over classes.",
    "angles": "Fig. 3: directions of two-dimensional features.",
    "label_distribution": (
        "Fig. 4: base classes that unseen images are taken for, and the accuracy of classes sorted by it."
    ),
    "losses": "Table 3: four losses.",
    "regularizers": "Table 4: regularizers one at a time.",
    "label_smoothing": "Table 5: label smoothing beside the margin.",
    "tsne": "Fig. 7: t-SNE of features.",
    "shots": "Fig. 8: accuracy over the number of shots.",
    "finetuning_margin": "Fig. 9: accuracy over the margin of the fine-tuning.",
}
_WITH_SWEEP = ("variance", "label_distribution", "tsne", "shots", "finetuning_margin")


def read(folder: Path) -> dict[str, Any]:
    """The results files that are in ``folder``, by name.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not hold what its name says.
    """
    return {name: read_table(folder, name) for name, file in FILES.items() if (folder / file).exists()}


def section(results: Mapping[str, Any], link: str) -> list[str]:
    """Lines of Markdown about one folder: verdicts and pictures.

    Args:
        results: of ``read``, not empty.
        link: the folder, as the page links it.
    """
    head = next(iter(results.values()))
    lines = source_markdown(head["data"]["name"], head["versions"])
    lines += findings_markdown(
        [finding for name, find in FINDINGS.items() if name in results for finding in find(results[name]["rows"])]
    )
    for analysis, caption in CAPTIONS.items():
        if analysis in results:
            sweep = " --sweep SWEEP" if analysis in _WITH_SWEEP else ""
            command = f"{_command(analysis)} --config {link}/{analysis}.yaml{sweep} --output OUTPUT"
            lines += picture_markdown(f"{link}/{analysis}.png", caption, command)
    return lines


def _command(analysis: str) -> str:
    return f"fewshot-ext analyze {analysis.replace('_', '-')}"


def missing(results: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: the analyses that no folder has, with the command that makes them."""
    there = {name for own in results.values() for name in own}
    lines = []
    for analysis in (name for name in CAPTIONS if name not in there):
        data = "mnist" if analysis == "angles" else "DATA"
        arguments = "--sweep SWEEP" if analysis in _WITH_SWEEP else f"--data {data} --output OUTPUT"
        lines.append(f"- `{_command(analysis)} {arguments}`")
    return lines


def margin_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 1 and 6: what margins do to accuracy on base and on novel classes.

    The negative margin is chosen where it is not measured: on validation classes, or, without any, for each seed by the
    novel accuracy of the other seeds.
    """
    found = []
    for loss in values(rows, "loss"):
        of_loss, title = select(rows, loss=loss), LOSS_TITLES[loss]
        margins = values(of_loss, "margin")
        if 0.0 not in margins:
            continue
        for shot in values(select(rows, classes="novel"), "shot"):
            cells = {name: select(of_loss, classes=name, shot=shot) for name in ("base", "validation", "novel")}
            source = "Fig. 1" if loss == "cosine" else "Fig. 6b"
            where = f"{title}, {shot}-shot"
            if margins[0] < 0:
                chosen = choose_margins(cells["validation"], cells["novel"])
                named = ", ".join(f"{margin:g}" for margin in sorted(set(chosen.values())))
                gains = {name: _gain(cells[name], chosen) for name in ("novel", "base")}
                claim = f"a negative margin gains on novel classes ({where})"
                found.append(_signed(source, claim, f"margin {named} against 0: ", gains["novel"], 1))
                claim = f"and loses on base classes ({where})"
                found.append(_signed(source, claim, f"margin {named} against 0: ", gains["base"], -1))
            if margins[-1] > 0:
                largest = dict.fromkeys(values(of_loss, "seed"), margins[-1])
                for name, sign, verb in (("base", 1, "gains on base"), ("novel", -1, "loses on novel")):
                    claim = f"a positive margin {verb} classes ({where})"
                    gain = _gain(cells[name], largest)
                    found.append(_signed(source, claim, f"margin {margins[-1]:g} against 0: ", gain, sign))
            if len(margins) > 2:
                found.append(_bell(cells["novel"], margins, where))
    return found


def choose_margins(validation: Sequence[Row], novel: Sequence[Row]) -> dict[int, float]:
    """The negative margin of each seed, chosen where it is not measured.

    Args:
        validation: accuracies on validation classes, none where there are none.
        novel: accuracies on novel classes, by which each seed's margin is chosen on the other seeds without validation
            classes; a single seed chooses for itself.

    Returns:
        The margin by seed.
    """
    chosen = {}
    for seed in values(novel, "seed"):
        judges = list(validation) or [row for row in novel if row["seed"] != seed] or list(novel)
        negative = [margin for margin in values(judges, "margin") if margin < 0]
        chosen[seed] = max(negative, key=lambda margin: mean_accuracy(select(judges, margin=margin))[0])
    return chosen


def variance_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 2: which way the variances go as the margin rises."""
    found = []
    claims = (
        ("inter", "base", 1, "$D_{inter}$ of base classes rises with the margin"),
        ("ratio", "base", 1, "base classes become more discriminative ($\\phi$ rises)"),
        ("intra", "novel", 1, "$D_{intra}$ of novel classes rises with the margin"),
        ("ratio", "novel", -1, "novel classes become less discriminative ($\\phi$ falls)"),
    )
    for loss in values(rows, "loss"):
        for name, classes, sign, claim in claims:
            own = select(rows, loss=loss, classes=classes)
            if len(values(own, "margin")) > 1:
                found.append(_trend("Fig. 2", f"{claim} ({LOSS_TITLES[loss]})", own, name, sign))
    return found


def proposition_findings(rows: Sequence[Row]) -> list[Finding]:
    """Section 3.4: where the premises are met, does the conclusion hold? And is the proof's model of D_intra right?"""
    met = [row for row in rows if row["premises"]]
    held = sum(row["conclusion"] for row in met)
    elsewhere = sum(row["conclusion"] for row in rows) - held
    measured = (
        f"premises met for {len(met)} of {len(rows)} pairs of neighboring margins; the conclusion held for {held} of "
        f"them, and for {elsewhere} of the other {len(rows) - len(met)}"
    )
    claim = "where the premises of the proposition are met, its conclusion holds"
    verdict = NOT_SHOWN if not met or 0 < held < len(met) else SHOWN if held else CONTRADICTED
    errors = sorted(abs(row["modeled_novel_intra"] / row["novel_intra"] - 1) for row in rows)
    model = "its proof's $D_{intra}(I^n) = P^s D_{intra}(I^b) + (1 - P^s) D_{inter}(I^b)$ holds"
    off = 100 * errors[len(errors) // 2]
    return [
        Finding("Sec. 3.4", claim, measured, verdict),
        Finding("Sec. 3.4", model, f"off by {off:.0f} % (median over pairs)", SHOWN if off < 10 else CONTRADICTED),
    ]


def group_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 4: accuracy of class groups sorted by P^s, and which margins they favor."""
    found = []
    groups = values(rows, "group")
    for shot in values(rows, "shot"):
        of_shot = select(rows, shot=shot)
        margins = values(of_shot, "margin")
        if margins[0] < 0 and 0.0 in margins:
            gains = [_best_negative(select(of_shot, group=group)) for group in groups]
            favor, oppose = (sum(sign_of(gain) == sign for _, gain in gains) for sign in (1, -1))
            measured = "best negative margin against 0, groups by rising $P^s$: " + "; ".join(
                f"{margin:g} {gain.mean:+.2f} ± {gain.interval:.2f}" for margin, gain in gains
            )
            observed = 1 if 2 * favor > len(groups) else -1 if 2 * oppose > len(groups) else 0
            claim = f"most groups favor a negative margin ({shot}-shot)"
            found.append(Finding("Fig. 4", claim, f"{measured} points", judge(1, observed)))
        if len(groups) > 1:
            means = [mean_accuracy(select(of_shot, group=group)) for group in (groups[0], groups[-1])]
            gap = means[1][0] - means[0][0]
            clear = abs(gap) > means[0][1] + means[1][1]
            measured = (
                f"lowest $P^s$ {means[0][0]:.2f} ± {means[0][1]:.2f} %, highest {means[1][0]:.2f} ± {means[1][1]:.2f} %"
            )
            verdict = judge(1, (1 if gap > 0 else -1) if clear else 0)
            claim = f"classes with a smaller $P^s$ are recognized worse ({shot}-shot)"
            found.append(Finding("Fig. 4", claim, measured, verdict))
    return found


def angle_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 3: directions of two-dimensional features."""
    if len(values(rows, "margin")) < 2:
        return []
    claims = (
        ("intra", "base", -1, "clusters of base classes get thinner with the margin ($D_{intra}$ falls)"),
        ("inter", "base", 1, "and their centers move apart ($D_{inter}$ rises)"),
        ("peaks", "novel", 1, "novel classes break into more peaks"),
        ("ratio", "novel", -1, "novel classes become less discriminative ($\\phi$ falls)"),
    )
    return [_trend("Fig. 3", claim, select(rows, classes=classes), name, sign) for name, classes, sign, claim in claims]


def shot_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 8: does the negative margin help at every number of shots, and less so with more of them?"""
    found = []
    shots = values(rows, "shot")
    for margin in (margin for margin in values(rows, "margin") if margin < 0):
        zero = select(rows, margin=0.0)
        if not zero:
            break
        gains = [difference(select(rows, margin=margin, shot=k), select(zero, shot=k)) for k in shots]
        signs = {sign_of(gain) for gain in gains}
        measured = "; ".join(
            f"{k}-shot {gain.mean:+.2f} ± {gain.interval:.2f}" for k, gain in zip(shots, gains, strict=True)
        )
        verdict = SHOWN if signs == {1} else CONTRADICTED if signs == {-1} else NOT_SHOWN
        claim = f"margin {margin:g} is better than 0 at every number of shots"
        found.append(Finding("Fig. 8", claim, f"{measured} points", verdict))
        first, last = gains[0], gains[-1]
        clear = abs(first.mean - last.mean) > (first.interval**2 + last.interval**2) ** 0.5
        # Where there is no lead, none can shrink.
        shrinks = judge(1, (1 if first.mean > last.mean else -1) if clear and sign_of(first) > 0 else 0)
        measured = f"{first.mean:+.2f} points at {shots[0]} shots, {last.mean:+.2f} at {shots[-1]}"
        claim = f"and its lead shrinks with more shots (margin {margin:g})"
        found.append(Finding("Fig. 8", claim, measured, shrinks))
    return found


def finetuning_findings(rows: Sequence[Row]) -> list[Finding]:
    """Fig. 9: the margin of the fine-tuning matters little, and more of it helps at one shot."""
    found = []
    for margin in values(rows, "margin"):
        of_margin = select(rows, margin=margin)
        for shot in values(of_margin, "shot"):
            cells = {
                own: select(of_margin, shot=shot, finetuning_margin=own) for own in values(rows, "finetuning_margin")
            }
            smallest, largest = min(cells), max(cells)
            gain = difference(cells[largest], cells[smallest])
            where = f"{shot}-shot, pre-training margin {margin:g}"
            prefix = f"fine-tuning margin {largest:g} against {smallest:g}: "
            if shot == 1:
                found.append(
                    _signed("Fig. 9", f"accuracy rises with the fine-tuning margin ({where})", prefix, gain, 1)
                )
            else:
                means = [mean_accuracy(cell)[0] for cell in cells.values()]
                spread = max(means) - min(means)
                measured = f"best and worst of {len(cells)} margins {spread:.2f} points apart"
                claim = f"accuracy hardly depends on the fine-tuning margin ({where}; within 1 point)"
                found.append(Finding("Fig. 9", claim, measured, SHOWN if spread <= 1 else CONTRADICTED))
    return found


def regularizer_findings(rows: Sequence[Row]) -> list[Finding]:
    """Table 4: what the margin and each further regularizer gains on novel classes."""
    rows, found = select(rows, classes="novel"), []
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for shot in values(rows, "shot"):
        cells = {variant: select(rows, variant=variant, shot=shot) for variant in variants}
        for variant in variants[1:]:
            other = variants[0] if variant == variants[1] else variants[1]
            # The paper's table has the margin, weight decay and DropBlock.
            in_table = variant == variants[1] or any(name in variant for name in ("weight decay", "DropBlock"))
            source = "Table 4" if in_table else "not in the paper"
            sign, verb = (-1, "loses against") if variant.endswith("no augmentation") else (1, "gains over")
            claim = f"{variant} {verb} {other} (novel classes, {shot}-shot)"
            found.append(_signed(source, claim, "", difference(cells[variant], cells[other]), sign))
    return found


def label_smoothing_findings(rows: Sequence[Row]) -> list[Finding]:
    """Table 5: label smoothing helps base classes and hurts others, the negative margin does the opposite."""
    found = []
    unseen = "validation" if select(rows, classes="validation") else "novel"
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for shot in values(select(rows, classes=unseen), "shot"):
        for classes, signs in (("base", (1, -1)), (unseen, (-1, 1))):
            cells = {variant: select(rows, variant=variant, shot=shot, classes=classes) for variant in variants}
            for variant, sign in zip(variants[1:], signs, strict=True):
                verb = "gains" if sign > 0 else "loses"
                claim = f"{variant} {verb} on {classes} classes ({shot}-shot)"
                gain = difference(cells[variant], cells[variants[0]])
                found.append(_signed("Table 5", claim, f"against {variants[0]}: ", gain, sign))
    return found


def loss_findings(rows: Sequence[Row]) -> list[Finding]:
    """Table 3: a negative margin gains over none, with either loss and on every image set."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = select(rows, data=data)
        for shot in values(of_data, "shot"):
            for loss, plain in WITHOUT_MARGIN.items():
                ours, theirs = (select(of_data, variant=variant, shot=shot) for variant in (loss, plain))
                claim = f"{loss} gains over {plain} ({data}, {ours[0]['classes']} classes, {shot}-shot)"
                prefix = f"margin {ours[0]['margin']:g} against 0: "
                found.append(_signed("Table 3", claim, prefix, difference(ours, theirs), 1))
    return found


# By the name of the results file. t-SNE has no claim that a number could decide.
FINDINGS: dict[str, Callable[[Sequence[Row]], list[Finding]]] = {
    "margins": margin_findings,
    "variance": variance_findings,
    "angles": angle_findings,
    "group_accuracy": group_findings,
    "proposition": proposition_findings,
    "losses": loss_findings,
    "regularizers": regularizer_findings,
    "label_smoothing": label_smoothing_findings,
    "shots": shot_findings,
    "finetuning_margin": finetuning_findings,
}
FILES = {name: f"{name}.json" for name in {**CAPTIONS, **FINDINGS}}


def _signed(source: str, claim: str, prefix: str, gain: Difference, sign: int) -> Finding:
    return Finding(source, claim, prefix + gain_text(gain), judge(sign, sign_of(gain)))


def _gain(rows: Sequence[Row], margins: Mapping[int, float]) -> Difference:
    """The margin of each seed against margin 0."""
    chosen = [row for row in rows if margins.get(row["seed"]) == row["margin"]]
    return difference(chosen, select(rows, margin=0.0))


def _best_negative(rows: Sequence[Row]) -> tuple[float, Difference]:
    """The negative margin with the highest accuracy, and how far it lies above margin 0."""
    negative = [margin for margin in values(rows, "margin") if margin < 0]
    best = max(negative, key=lambda margin: mean_accuracy(select(rows, margin=margin))[0])
    return best, difference(select(rows, margin=best), select(rows, margin=0.0))


def _bell(rows: Sequence[Row], margins: Sequence[float], where: str) -> Finding:
    best = max(margins, key=lambda margin: mean_accuracy(select(rows, margin=margin))[0])
    ends = [difference(select(rows, margin=best), select(rows, margin=end)) for end in (margins[0], margins[-1])]
    measured = f"best at {best:g}; " + ", ".join(
        f"{gain.mean:+.2f} ± {gain.interval:.2f} points over margin {end:g}"
        for end, gain in zip((margins[0], margins[-1]), ends, strict=True)
        if end != best
    )
    peak = margins[0] < best < margins[-1] and all(sign_of(gain) > 0 for gain in ends)
    # A best margin at 0 or above is no bell on the negative side, whatever its shape.
    verdict = SHOWN if peak and best < 0 else CONTRADICTED if best > 0 else NOT_SHOWN
    claim = f"novel accuracy over the margin is a bell with its top at a negative margin ({where})"
    return Finding("Fig. 6", claim, measured, verdict)


def _trend(source: str, claim: str, rows: Sequence[Row], name: str, sign: int) -> Finding:
    """Whether a quantity rises or falls with the margin, by the rank correlation in every seed."""
    margins, correlations, ends = values(rows, "margin"), [], []
    for seed in values(rows, "seed"):
        curve = [fmean(row[name] for row in select(rows, seed=seed, margin=margin)) for margin in margins]
        correlations.append(rank_correlation(margins, curve))
        ends.append((curve[0], curve[-1]))
    observed = 1 if min(correlations) >= 0.8 else -1 if max(correlations) <= -0.8 else 0
    first, last = (fmean(side) for side in zip(*ends, strict=True))
    measured = f"{first:.3g} at margin {margins[0]:g}, {last:.3g} at {margins[-1]:g}; rank correlation by seed "
    return Finding(
        source, claim, measured + ", ".join(f"{value:+.2f}" for value in correlations), judge(sign, observed)
    )


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant.

    Example:
        >>> rank_correlation([1, 2, 3], [5, 9, 40])
        1.0
    """
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return 0.0
    return round(float(spearmanr(xs, ys).statistic), 6)
