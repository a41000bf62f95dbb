"""The page about DeepEMD: verdicts, tables and errors on made-up results, and the page of files that commands wrote."""

import json
import re
from dataclasses import replace
from pathlib import Path

import findings
import pytest
import torch
from deepemd_claims import deepemd_findings, paired_gain, retrieval_findings
from deepemd_results import read, read_comparison
from PIL import Image
from verdicts import CONTRADICTED, NOT_SHOWN, SHOWN

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.evaluation import ComparisonResults, HeadAccuracy, mean_and_interval
from fewshot_ext.experiments.tables import write_table
from fewshot_ext.training import BackboneConfig, PreTrainingConfig, pretrain

QUERIES = 75
NOISE = (5, -5, 0, 3, -3, 0)
VERSIONS = {"fewshot_ext": "0.1.0", "torch": "2"}


def accuracy(backbone, head, shot, correct, noise=NOISE):
    """A head that classifies about so many of 75 queries rightly; all heads have the luck of the same episodes."""
    return HeadAccuracy(backbone, head, shot, tuple(correct + extra for extra in noise), QUERIES)


def comparison(accuracies, regions="fcn"):
    accuracies = list(accuracies)
    names = list(dict.fromkeys(row.backbone for row in accuracies))
    return ComparisonResults(
        config={"seed": 0, "local_features": {"name": regions}},
        versions=VERSIONS,
        data={"name": "digits", "sha256": "0", "split": "novel"},
        backbones=[{"name": name, "similarity": "cosine", "sha256": f"sum of {name}", "path": name} for name in names],
        way=5,
        accuracies=accuracies,
    )


def table(correct, names=("pretrained", "meta_trained"), shots=(1, 5)):
    """Results of the heads in ``correct``, each with its queries before and after meta-training."""
    return comparison(
        accuracy(name, head, shot, counts[k % 2])
        for k, name in enumerate(names)
        for head, counts in correct.items()
        for shot in shots
    )


def retrieval(before=0.5, after=0.6, queries=10_000, **changes):
    measures = {"queries": queries, "gallery_images": queries, "recall_at_1": before, "recall_at_2": 0.75}
    if after is not None:
        measures |= {"recall_at_1_reranked": after, "recall_at_2_reranked": 0.875}
    return {
        "checkpoint": {"path": "meta_trained/best.ckpt", "sha256": "sum of meta_trained"},
        "images": {"data": "digits", "split": "novel", "query": None, "gallery": None},
        "rerank": None if after is None else {"candidates": 50},
        "measures": measures,
        "versions": VERSIONS,
        **changes,
    }


def write(folder, evaluation=None, retrieved=None, matched=None, ten_way=None):
    for name in ("evaluation", "evaluation_10way", "retrieval", "matches"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, results in (("evaluation", evaluation), ("evaluation_10way", ten_way)):
        if results is not None:
            results.write(folder / name)
    if retrieved is not None:
        (folder / "retrieval" / "retrieval.json").write_text(json.dumps(retrieved))
        Image.new("L", (2, 2)).save(folder / "retrieval" / "neighbors.png")
    if matched is not None:
        write_table(folder / "matches", "matches", [{"pair": 1, "regions": 16}], **matched)
        Image.new("L", (2, 2)).save(folder / "matches" / "matches.png")
    return folder


MATCHES = {
    "config": {"flows": 5},
    "checkpoint": {"name": "best.ckpt", "sha256": "sum of meta_trained"},
    "data": {"name": "digits"},
    "versions": VERSIONS,
}


def verdicts(results):
    return {finding.claim: finding.verdict for finding in deepemd_findings(results)}


ALL = {
    "protonet@fcn": (40, 41),
    "matchingnet@fcn": (40, 41),
    "fc_dot": (40, 41),
    "fc_cosine": (40, 41),
    "knn": (40, 41),
    "prediction_fusion": (40, 41),
    "deepemd_uniform": (41, 42),
    "deepemd_mean": (42, 43),
    "deepemd": (45, 50),
    "deepemd@grid": (46, 51),
    "deepemd@sampling": (47, 52),
}


def test_the_numbers_of_the_paper_are_shown():
    found = deepemd_findings({"evaluation": table(ALL), "retrieval": retrieval()})
    assert {finding.verdict for finding in found} == {SHOWN}
    sources = [finding.source for finding in found]
    assert list(dict.fromkeys(sources)) == ["meta-training", "baselines", "weights", "k-shot", "regions", "retrieval"]
    # Heads x shots x stages; the structured layer is there with several shots alone.
    assert [sources.count(name) for name in dict.fromkeys(sources)] == [3 * 2, 6 * 4, 4, 2, 2 * 4, 1]
    by_claim = {finding.claim: finding.measured for finding in found}
    assert by_claim["meta-training raises the accuracy of DeepEMD (1-shot)"] == "+6.67 ± 0.00 points"
    assert by_claim["DeepEMD beats kNN on local features (5-shot, pre-trained)"] == "+6.67 ± 0.00 points"


def test_the_opposite_numbers_contradict():
    opposite = {head: tuple(75 - count for count in counts) for head, counts in ALL.items()}
    found = deepemd_findings({"evaluation": table(opposite), "retrieval": retrieval(0.6, 0.5)})
    assert {finding.verdict for finding in found} == {CONTRADICTED}
    assert len(found) == 45


def test_equal_numbers_show_nothing():
    found = deepemd_findings({"evaluation": table(dict.fromkeys(ALL, (40, 40))), "retrieval": retrieval(0.5, 0.5)})
    assert {finding.verdict for finding in found} == {NOT_SHOWN}


def test_differences_are_taken_episode_by_episode():
    ours = accuracy("pretrained", "deepemd", 1, 41)
    paired = comparison([accuracy("pretrained", "knn", 1, 40), ours])
    (finding,) = deepemd_findings({"evaluation": paired})
    assert (finding.measured, finding.verdict) == ("+1.33 ± 0.00 points", SHOWN)
    # The same means on luck that the two do not share.
    crossed = comparison([accuracy("pretrained", "knn", 1, 40, NOISE[::-1]), ours])
    (finding,) = deepemd_findings({"evaluation": crossed})
    mean, interval = mean_and_interval(crossed.accuracies[1].per_episode() - crossed.accuracies[0].per_episode())
    assert interval > mean
    assert (finding.measured, finding.verdict) == (f"{mean:+.2f} ± {interval:.2f} points", NOT_SHOWN)


SEEDS = ("pre_s0", "meta_s0", "pre_s1", "meta_s1")


def test_seeds_are_averaged_over_the_same_episodes():
    rows = [accuracy(name, "deepemd", 1, correct) for name, correct in zip(SEEDS, (40, 43, 40, 46), strict=True)]
    gain = paired_gain(comparison(rows), (SEEDS[1::2], "deepemd"), (SEEDS[::2], "deepemd"), 1)
    assert gain.by_seed == pytest.approx((4.0, 8.0))
    assert (gain.mean, gain.interval) == (pytest.approx(6.0), pytest.approx(0.0, abs=1e-9))
    assert paired_gain(comparison(rows[:-1]), (SEEDS[1::2], "deepemd"), (SEEDS[::2], "deepemd"), 1) is None
    (finding,) = deepemd_findings({"evaluation": comparison(rows)})
    assert finding.measured == "+6.00 ± 0.00 points (by seed +4.00, +8.00)"
    # Three times the same trainings are no more evidence than one.
    noisy = [accuracy(f"{stage}_s{seed}", "deepemd", 1, 40, NOISE[:: 1 if stage == "pre" else -1])
             for seed in range(3) for stage in ("pre", "meta")]  # fmt: skip
    one, three = (
        paired_gain(comparison(part), *(([r.backbone for r in part[start::2]], "deepemd") for start in (1, 0)), 1)
        for part in (noisy[:2], noisy)
    )
    assert one.interval == pytest.approx(three.interval)
    assert one.interval > 1


def test_seeds_that_disagree_show_nothing():
    rows = [accuracy(name, "deepemd", 1, correct) for name, correct in zip(SEEDS, (40, 50, 40, 39), strict=True)]
    assert verdicts({"evaluation": comparison(rows)}) == {
        "meta-training raises the accuracy of DeepEMD (1-shot)": NOT_SHOWN
    }


def test_heads_are_compared_on_the_same_regions():
    rows = [accuracy("one", head, 1, correct) for head, correct in
            (("protonet", 30), ("protonet@grid", 40), ("knn", 40), ("deepemd@grid", 42))]  # fmt: skip
    # "knn" looks at the regions of the settings.
    assert verdicts({"evaluation": comparison(rows, regions="grid")}) == {
        "DeepEMD, regions from a grid of crops beats ProtoNet, regions from a grid of crops (1-shot, one)": SHOWN,
        "DeepEMD, regions from a grid of crops beats kNN on local features, regions from a grid of crops "
        "(1-shot, one)": SHOWN,
    }
    with_map = [*rows, accuracy("one", "deepemd@fcn", 1, 44)]
    found = verdicts({"evaluation": comparison(with_map, regions="grid")})
    assert found["DeepEMD beats ProtoNet (1-shot, one)"] == SHOWN
    assert found["regions from a grid of crops beat the positions of the feature map (1-shot, one)"] == CONTRADICTED


def test_the_interval_of_recall_holds_for_any_pairing():
    (finding,) = retrieval_findings(retrieval(0.5, 0.52, queries=100))
    # At most all queries change sides: 51 found only afterwards and 49 only before, or as far as 0.5 and 0.52 allow.
    assert finding.measured == "50.00 % by embeddings, 52.00 % re-ranked: +2.00 ± 19.40 points"
    assert finding.verdict == NOT_SHOWN
    assert retrieval_findings(retrieval(0.5, 0.52, queries=100_000))[0].verdict == SHOWN
    assert retrieval_findings(retrieval(after=None)) == []


def test_the_page_has_the_numbers(tmp_path):
    ten_way = replace(table({"knn": (30, 35), "deepemd": (40, 45)}, shots=(1,)), way=10)
    folder = write(tmp_path / "docs" / "digits", table(ALL), retrieval(), MATCHES, ten_way)
    text = findings.findings("deepemd", [folder], tmp_path / "docs")
    before, ten, after = re.split(r"(?=10-way accuracy|Retrieval \(%\))", text)
    assert re.findall(r"\(`(\w+)`\) \|[^|]*\|[^|]* ± [^|]*\|\n", ten) == ["knn", "deepemd"]
    assert "--config digits/evaluation_10way/config.yaml" in ten
    text = before + after
    assert "Image set digits; fewshot_ext 0.1.0, torch 2." in text
    assert "5-way accuracy (%) on novel classes" in text
    assert "of one training: it covers the draw of episodes alone." in text
    assert "| head | pre-trained, 1-shot | pre-trained, 5-shot | meta-trained, 1-shot | meta-trained, 5-shot |" in text
    rows = {match[1]: match[0] for match in re.finditer(r"\|[^|\n]*\(`([^`]*)`\).*", text)}
    assert list(rows) == list(ALL)
    for row in table(ALL).accuracies:
        mean, interval = mean_and_interval(row.per_episode())
        best = "**" if row.head == "deepemd@sampling" else ""
        assert f" {best}{mean:.2f} ± {interval:.2f}{best} |" in rows[row.head]
    assert "10,000 queries of novel classes, each searched among all other images; meta-trained backbone." in text
    assert "| embeddings | 50.00 | 75.00 |\n| the 50 nearest re-ranked by the EMD | 60.00 | 87.50 |" in text
    assert "45 shown, 0 not shown, 0 contradicted." in text
    assert (
        "(50 nearest, meta-trained) | 50.00 % by embeddings, 60.00 % re-ranked: +10.00 ± 1.85 points | **shown** |"
        in text
    )
    assert "![Queries and what is found for each" in text
    assert "](digits/retrieval/neighbors.png)" in text
    assert "between the 16 regions of two images, and below them how much each region counts (meta-trained back" in text
    assert "](digits/matches/matches.png)" in text
    assert "Not yet measured" not in text


def test_the_page_says_what_intervals_over_seeds_cover(tmp_path):
    rows = [accuracy(name, head, 1, correct) for name, correct in zip(SEEDS, (40, 43, 41, 46), strict=True)
            for head in ("knn", "deepemd")]  # fmt: skip
    folder = write(tmp_path / "digits", comparison(rows[:-1]))
    text = findings.findings("deepemd", [folder], tmp_path)
    assert "Mean over 2 trainings, which meet the same episodes, and 95 % interval over 6 episodes" in text
    mean, interval = mean_and_interval(rows[0].per_episode() * 0.5 + rows[4].per_episode() * 0.5)
    assert f"| kNN on local features (`knn`) | **{mean:.2f} ± {interval:.2f}** |" in text
    # One of the two trainings is not measured: no mean of the other is passed off as that of both.
    assert re.search(r"\(`deepemd`\) \|[^|]*\d[^|]*\| \|", text)


def test_what_is_missing_is_listed_with_its_command(tmp_path):
    assert findings.findings("deepemd", [], tmp_path).splitlines() == [
        "Not yet measured:",
        "",
        "- DATA, accuracies: `fewshot-ext evaluate --checkpoint PRETRAINED META_TRAINED --data DATA --queries 15 "
        "--heads deepemd_table --shots 1 5 --output DATA/evaluation`",
        "- DATA, 10-way: `fewshot-ext evaluate --checkpoint PRETRAINED META_TRAINED --data DATA --queries 15 --heads "
        "deepemd_table --way 10 --shots 1 --output DATA/evaluation_10way`",
        "- DATA, retrieval with re-ranking: `fewshot-ext retrieve --checkpoint META_TRAINED --data DATA --rerank 50 "
        "--output DATA/retrieval`",
        "- DATA, a picture of matches: `fewshot-ext analyze matches --checkpoint META_TRAINED --data DATA --output "
        "DATA/matches`",
    ]
    some = {head: ALL[head] for head in ALL if head not in ("knn", "deepemd@grid")}
    folder = write(tmp_path / "small", table(some, ["4x4"], shots=(1,)), retrieval(after=None))
    missing = findings.findings("deepemd", [folder], tmp_path).partition("Not yet measured:")[2]
    assert "- small, knn, deepemd@grid, 5-shot, meta-training: `fewshot-ext evaluate" in missing
    assert "--data digits" in missing
    assert "- small, retrieval with re-ranking:" in missing
    assert "--output small/matches`" in missing
    # A head that only the first backbone has been measured under is not measured.
    interrupted = table(ALL)
    interrupted.accuracies.pop()
    folder = write(tmp_path / "interrupted", interrupted)
    assert "- interrupted, deepemd@sampling: `" in findings.findings("deepemd", [folder], tmp_path)


@pytest.mark.parametrize("present", [{"retrieved": retrieval()}, {"matched": MATCHES}])
def test_a_folder_with_one_kind_of_results(present, tmp_path):
    text = findings.findings("deepemd", [write(tmp_path / "digits", **present)], tmp_path)
    assert "Image set digits" in text
    assert "digits, accuracies: `" in text
    assert "backbone)" not in text  # nobody knows which


def rewritten(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [row.pop("correct") for row in c["accuracies"]], "lacks 'correct'"),
        (lambda c: c.pop("backbones"), "content lacks 'backbones'"),
        (lambda c: c.update(accuracies=[]), "holds no accuracies: the evaluation was interrupted"),
        (lambda c: c["accuracies"][0].update(correct=3), "does not hold the results of fewshot-ext evaluate"),
        (lambda c: c["accuracies"][0].update(correct=[]), "counts from 0 to 75 for knn on pretrained, 1-shot, got"),
        (lambda c: c["accuracies"][0].update(correct=[76] * 6), "counts from 0 to 75"),
        (lambda c: c["accuracies"][0].update(correct=[0.5] * 6), "counts from 0 to 75"),
        (
            lambda c: c["accuracies"][1]["correct"].pop(),
            "got 6 episodes of 75 queries for knn on pretrained, 1-shot, 5 episodes of 75 queries for deepemd",
        ),
        (lambda c: c["accuracies"][1].update(queries=80), "expected the same episodes for all heads"),
        (lambda c: c["accuracies"][0].update(head="svm"), "got 'svm'"),
        (lambda c: c["backbones"].reverse(), "expected backbones in pairs, each before and after its meta-training"),
        (lambda c: c["backbones"].append({"name": "third"}), "got pretrained, meta_trained, third"),
    ],
)
def test_a_wrong_results_file_is_named(change, message, tmp_path):
    write(tmp_path, table({"knn": (40, 41), "deepemd": (45, 50)}, shots=(1,)))
    path = rewritten(tmp_path / "evaluation" / "results.json", change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_comparison(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("evaluation/results.json", "{", "does not hold the results of fewshot-ext evaluate"),
        ("evaluation/results.json", "[]", "does not hold the results of fewshot-ext evaluate"),
        ("retrieval/retrieval.json", "{", "does not hold the results of fewshot-ext retrieve"),
        ("retrieval/retrieval.json", '{"images": {}}', "retrieve: content lacks 'checkpoint'"),
        (
            "retrieval/retrieval.json",
            json.dumps(retrieval(measures={"queries": 9, "recall_at_2": 0.5})),
            "retrieve: content['measures'] lacks 'gallery_images'",
        ),
        ("retrieval/retrieval.json", "3", "does not hold the results of fewshot-ext retrieve"),
        ("matches/matches.json", '{"analysis": "shots", "rows": []}', "it holds the analysis 'shots'"),
    ],
)
def test_files_of_something_else_are_named(file, text, message, tmp_path):
    write(tmp_path, table(ALL), retrieval(), MATCHES)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_results_of_two_image_sets(tmp_path):
    elsewhere = {"data": "omniglot28", "split": "novel", "query": None}
    write(tmp_path, table(ALL), retrieval(images=elsewhere), {**MATCHES, "data": None})
    message = "one image set, got digits in evaluation/results.json, omniglot28 in retrieval/retrieval.json"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("picture", ["retrieval/neighbors.png", "matches/matches.png"])
def test_a_missing_picture(picture, tmp_path):
    write(tmp_path, table(ALL), retrieval(), MATCHES)
    (tmp_path / picture).unlink()
    with pytest.raises(FileNotFoundError, match=f"{picture} is missing"):
        read(tmp_path)


def test_pictures_of_ones_own_and_a_gallery(tmp_path):
    own = {"data": None, "split": "novel", "query": "/home/me/birds", "gallery": "/home/me/all"}
    folder = write(tmp_path / "mine", retrieved=retrieval(images=own), matched={**MATCHES, "data": None})
    text = findings.findings("deepemd", [folder], tmp_path)
    assert "Image set birds;" in text
    assert "Retrieval (%): 10,000 queries, searched among 10,000 images." in text


@pytest.mark.usefixtures("one_thread")
def test_the_files_that_the_commands_write(tmp_path):
    digits, checkpoints = load_digits(), {}
    few = torch.cat([(digits.labels == label).nonzero().flatten()[:12] for label in range(10)])
    parts = (digits.images[few], digits.labels[few], digits.class_names, digits.class_split)
    ImageArchive(*parts).save(tmp_path / "few.npz")
    config = PreTrainingConfig(epochs=1, batch_size=30, backbone=BackboneConfig(width=8, pooled_blocks=2))
    for seed, name in enumerate(("pretrained", "meta_trained")):
        (tmp_path / name).mkdir()
        pretrain(config, ImageArchive(*parts).subset(Split.BASE), tmp_path / name, seed=seed)
        checkpoints[name] = str(tmp_path / name / "last.ckpt")
    folder, shared = tmp_path / "digits", ["--data", str(tmp_path / "few.npz"), "--threads", "1"]
    evaluate = ["evaluate", "--checkpoint", *checkpoints.values()]
    retrieve, matches = (
        [*command, "--checkpoint", checkpoints["meta_trained"]] for command in (["retrieve"], ["analyze", "matches"])
    )
    episodes = ["--heads", "knn", "deepemd", "--episodes", "2", "--queries", "2"]
    for command, name in (
        ([*evaluate, *episodes], "evaluation"),
        ([*retrieve, "--rerank", "9", "--no_nmi"], "retrieval"),
        (matches, "matches"),
    ):
        assert main([*command, *shared, "--output", str(folder / name)]) == 0
    page = tmp_path / "page.md"
    assert findings.main(["deepemd", "--results", str(folder), "--output", str(page)]) == 0
    text = page.read_text()
    assert "Image set few;" in text
    assert "(9 nearest, meta-trained)" in text
    assert "the 4 regions of two images, and below them how much each region counts (meta-trained backbone)" in text
    assert "- digits, protonet@fcn, matchingnet@fcn, fc_dot, fc_cosine, prediction_fusion, deepemd_uniform, " in text
    assert findings.page_with_findings("deepemd", [folder], page) == text
    # The commands on the page, with the settings that lie beside the results, repeat them.
    commands = (
        (evaluate, "evaluation/config.yaml"),
        (retrieve, "retrieval/config.yaml"),
        (matches, "matches/matches.yaml"),
    )
    for command, settings in commands:
        output = tmp_path / "again" / settings.partition("/")[0]
        data = shared if command is matches else []
        assert main([*command, "--config", str(folder / settings), *data, "--output", str(output)]) == 0
    before, after = (read(path) for path in (folder, tmp_path / "again"))
    assert before["evaluation"].accuracies == after["evaluation"].accuracies
    assert (
        before["retrieval"]["measures"]["recall_at_1_reranked"]
        == after["retrieval"]["measures"]["recall_at_1_reranked"]
    )
    assert before["matches"]["rows"] == after["matches"]["rows"]


def test_a_folder_without_results(tmp_path, capsys):
    command = ["deepemd", "--results", str(tmp_path), "--output", str(tmp_path / "page.md")]
    assert findings.main(command) == 2
    error = capsys.readouterr().err
    assert "holds none of the results files evaluation/results.json" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


PAGE = (Path(__file__).parents[2] / "docs" / "deepemd.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_the_examples_on_the_page_run(code):
    exec(code, {})


@pytest.mark.parametrize(
    "command", re.findall(r"^    fewshot-ext (.*)$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
)
def test_the_commands_on_the_page_are_understood(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--print_config"])
    assert caught.value.code == 0
    assert "output:" in capsys.readouterr().out
