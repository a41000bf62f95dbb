"""The negative-margin page: verdicts on made-up numbers whose truth is known."""

import pytest
from negative_margin import (
    angle_findings,
    choose_margins,
    finetuning_findings,
    group_findings,
    label_smoothing_findings,
    loss_findings,
    margin_findings,
    proposition_findings,
    rank_correlation,
    regularizer_findings,
    shot_findings,
    variance_findings,
)
from verdicts import CONTRADICTED, NOT_SHOWN, SHOWN, sign_of

from fewshot_ext.experiments.accuracies import difference


def accuracy(percent, seed=0, noise=0, **labels):
    """A row of 100 episodes with 100 queries each around ``percent``."""
    correct = [percent + noise * (-1) ** i for i in range(100)]
    return {"seed": seed, "shot": 1, "way": 5, "queries": 100, "correct": correct, **labels}


def sweep(novel, base, loss="cosine", **labels):
    """Accuracies by margin, the same for two seeds."""
    return [
        accuracy(percent, seed, loss=loss, margin=margin, classes=classes, **labels)
        for classes, curve in (("novel", novel), ("base", base))
        for margin, percent in curve.items()
        for seed in (0, 1)
    ]


def verdicts(findings):
    return [finding.verdict for finding in findings]


def test_the_curves_of_the_paper_are_shown():
    rows = sweep({-0.5: 50, -0.2: 60, 0.0: 55, 0.2: 50}, {-0.5: 70, -0.2: 75, 0.0: 80, 0.2: 82})
    found = margin_findings(rows)
    assert verdicts(found) == [SHOWN] * 5
    assert found[0].measured == "margin -0.2 against 0: +5.00 ± 0.00 points (by seed +5.00, +5.00)"
    assert {one.source for one in found} == {"Fig. 1", "Fig. 6"}


def test_the_opposite_curves_contradict():
    rows = sweep({-0.2: 50, 0.0: 55, 0.2: 60}, {-0.2: 85, 0.0: 80, 0.2: 75})
    assert verdicts(margin_findings(rows)) == [CONTRADICTED] * 5


def test_flat_curves_show_nothing():
    flat = {-0.2: 50, 0.0: 50, 0.2: 50}
    assert verdicts(margin_findings(sweep(flat, flat))) == [NOT_SHOWN] * 5


def test_seeds_that_disagree_show_nothing():
    rows = [accuracy(percent, seed, margin=margin, classes="novel", loss="cosine") for seed, margin, percent in
            ((0, -0.2, 70), (0, 0.0, 50), (1, -0.2, 49), (1, 0.0, 50))]  # fmt: skip
    rows += [{**row, "classes": "base"} for row in rows]
    assert margin_findings(rows)[0].verdict == NOT_SHOWN


def test_an_interval_that_holds_zero_shows_nothing():
    noisy = difference([accuracy(51, noise=30, margin=-0.2)], [accuracy(50, margin=0.0)])
    assert noisy.mean == 1.0
    assert sign_of(noisy) == 0


def test_the_margin_is_chosen_where_it_is_not_measured():
    novel = [
        accuracy(percent, seed, margin=margin)
        for seed, margin, percent in ((0, -0.1, 60), (0, -0.2, 50), (1, -0.1, 50), (1, -0.2, 60))
    ]
    assert choose_margins([], novel) == {0: -0.2, 1: -0.1}
    validation = [accuracy(percent, 0, margin=margin) for margin, percent in ((-0.1, 70), (-0.2, 60), (0.0, 90))]
    assert choose_margins(validation, novel) == {0: -0.1, 1: -0.1}
    assert choose_margins([], novel[:2]) == {0: -0.1}


def test_sweeps_that_say_nothing():
    assert margin_findings(sweep({-0.2: 50}, {-0.2: 50})) == []
    assert len(margin_findings(sweep({0.0: 50, 0.2: 40}, {0.0: 50, 0.2: 60}))) == 2


def variances(rising):
    """All four quantities of Fig. 2 by margin; base and novel classes as in the paper where ``rising``."""
    rows = []
    for seed in (0, 1):
        for margin in (-0.2, 0.0, 0.2):
            x = (1 + margin) if rising else (1 - margin)
            base = {"inter": x, "intra": 0.5, "ratio": x}
            novel = {"inter": 0.5, "intra": x, "ratio": 1 / x}
            for classes, values in (("base", base), ("novel", novel)):
                rows.append({"loss": "cosine", "seed": seed, "margin": margin, "classes": classes, **values})
    return rows


def test_trends():
    assert verdicts(variance_findings(variances(True))) == [SHOWN] * 4
    assert verdicts(variance_findings(variances(False))) == [CONTRADICTED] * 4
    mixed = [row if row["seed"] else other for row, other in zip(variances(True), variances(False), strict=True)]
    assert verdicts(variance_findings(mixed)) == [NOT_SHOWN] * 4
    assert variance_findings(variances(True)[:2]) == []


def proposition(premises, conclusion, modeled=1.0):
    return {"premises": premises, "conclusion": conclusion, "novel_intra": 1.0, "modeled_novel_intra": modeled}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([proposition(True, True), proposition(False, False)], SHOWN),
        ([proposition(True, False), proposition(False, True)], CONTRADICTED),
        ([proposition(True, True), proposition(True, False)], NOT_SHOWN),
        ([proposition(False, True)], NOT_SHOWN),
    ],
)
def test_proposition(rows, expected):
    found = proposition_findings(rows)
    assert verdicts(found) == [expected, SHOWN]
    off = proposition_findings([proposition(True, True, modeled=1.5)])[1]
    assert off.verdict == CONTRADICTED
    assert "off by 50 %" in off.measured


def test_groups():
    def rows(best):
        return [
            accuracy(60 + 5 * group + (5 if margin == best else 0), seed, margin=margin, group=group)
            for group in (0, 1, 2)
            for margin in (-0.2, 0.0, 0.2)
            for seed in (0, 1)
        ]

    assert verdicts(group_findings(rows(-0.2))) == [SHOWN, SHOWN]
    assert verdicts(group_findings(rows(0.0))) == [CONTRADICTED, SHOWN]
    assert verdicts(group_findings(rows(0.2))) == [NOT_SHOWN, SHOWN]
    upside_down = [{**row, "group": 2 - row["group"]} for row in rows(-0.2)]
    assert verdicts(group_findings(upside_down)) == [SHOWN, CONTRADICTED]


def test_angles():
    rows = [
        {"margin": margin, "seed": 0, "classes": classes, "class": "0", "intra": intra, "inter": 1 / intra,
         "ratio": ratio, "peaks": peaks}
        for margin, intra, ratio, peaks in ((-0.2, 0.3, 3.0, 1), (0.0, 0.2, 2.0, 2), (0.2, 0.1, 1.0, 3))
        for classes in ("base", "novel")
    ]  # fmt: skip
    assert verdicts(angle_findings(rows)) == [SHOWN] * 4
    assert angle_findings(rows[:2]) == []


def test_shots():
    def rows(gains):
        return [
            accuracy(50 + (gain if margin else 0), seed, margin=margin, shot=shot)
            for shot, gain in gains.items()
            for margin in (-0.2, 0.0)
            for seed in (0, 1)
        ]

    assert verdicts(shot_findings(rows({1: 5, 300: 1}))) == [SHOWN, SHOWN]
    assert verdicts(shot_findings(rows({1: 5, 300: -1}))) == [NOT_SHOWN, SHOWN]
    assert verdicts(shot_findings(rows({1: 5, 300: 9}))) == [SHOWN, CONTRADICTED]
    assert verdicts(shot_findings(rows({1: -1, 300: -5}))) == [CONTRADICTED, NOT_SHOWN]
    assert shot_findings([row for row in rows({1: 5}) if row["margin"]]) == []


def test_margin_of_the_fine_tuning():
    def rows(one_shot, five_shot):
        return [
            accuracy(percent, seed, margin=-0.2, finetuning_margin=own, shot=shot)
            for shot, curve in ((1, one_shot), (5, five_shot))
            for own, percent in zip((-0.3, 0.0, 0.3), curve, strict=True)
            for seed in (0, 1)
        ]

    assert verdicts(finetuning_findings(rows((50, 51, 52), (70, 70, 71)))) == [SHOWN, SHOWN]
    assert verdicts(finetuning_findings(rows((52, 51, 50), (70, 73, 71)))) == [CONTRADICTED, CONTRADICTED]
    assert verdicts(finetuning_findings(rows((50, 50, 50), (70, 70, 70)))) == [NOT_SHOWN, SHOWN]


def test_regularizers():
    table = {
        "margin 0": 50,
        "margin -0.1": 55,
        "margin -0.1, weight decay 0.001": 54,
        "margin -0.1, no augmentation": 40,
    }
    rows = [
        accuracy(percent, seed, variant=variant, classes="novel")
        for variant, percent in table.items()
        for seed in (0, 1)
    ]
    found = regularizer_findings(rows)
    assert verdicts(found) == [SHOWN, CONTRADICTED, SHOWN]
    assert [one.source for one in found] == ["Table 4", "Table 4", "not in the paper"]
    assert found[1].claim == "margin -0.1, weight decay 0.001 gains over margin -0.1 (novel classes, 1-shot)"


@pytest.mark.parametrize("unseen", ["validation", "novel"])
def test_label_smoothing(unseen):
    table = {
        "margin 0": {"base": 80, "novel": 50},
        "label smoothing 0.05": {"base": 83, "novel": 48},
        "margin -0.3": {"base": 75, "novel": 55},
    }
    rows = [
        accuracy(percent, seed, variant=variant, classes=unseen if classes == "novel" else classes)
        for variant, cells in table.items()
        for classes, percent in cells.items()
        for seed in (0, 1)
    ]
    found = label_smoothing_findings(rows)
    assert verdicts(found) == [SHOWN] * 4
    assert unseen in found[2].claim


def test_losses_are_compared_within_their_set():
    table = {"softmax": 60, "neg-softmax": 65, "cosine": 70, "neg-cosine": 64}
    rows = [
        accuracy(percent + shift, seed, variant=variant, margin=-0.1, data=data, classes="validation")
        for data, shift in (("mini", 0), ("mini+cub", -20))
        for variant, percent in table.items()
        for seed in (0, 1)
    ]
    found = loss_findings(rows)
    assert verdicts(found) == [SHOWN, CONTRADICTED] * 2
    assert "mini+cub" in found[2].claim


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0
    assert rank_correlation([1, 2, 3], [2, 2, 2]) == 0.0
