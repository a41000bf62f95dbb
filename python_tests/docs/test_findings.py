"""Pages of findings: what is written between the markers, and what is refused."""

import json
import shutil
from pathlib import Path

import findings
import pytest
import torch
from report import END, PAPERS, START, page_with_report, read_results, report

from fewshot_ext.cli import main
from fewshot_ext.experiments.tables import read_table, write_table

TRAINING = ["--data", "digits", "--epochs", "1", "--seeds", "0", "--cosine_margins", "-0.2", "0", "--losses", "cosine"]
TRAINING += ["--set", "backbone.pooled_blocks=3", "backbone.width=4", "batch_size=128"]
EPISODES = ["--episodes", "4", "--queries", "3", "--finetuning.steps", "2", "--shots", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with what the commands write."""
    folder, threads = tmp_path_factory.mktemp("measured"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["analyze", "margins", *TRAINING, *EPISODES, "--output", str(folder)]) == 0
    assert main(["analyze", "variance", "--sweep", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def results(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "docs" / "digits", ignore=shutil.ignore_patterns("runs"))


def test_a_page_with_claims_pictures_and_what_is_missing(results, tmp_path):
    text = page_with_report([results], tmp_path / "docs" / "page.md")
    assert text.startswith(START)
    assert text.rstrip().endswith(END)
    assert "### digits" in text
    assert (
        "| Fig. 1 | a negative margin gains on novel classes (cosine softmax, 1-shot) | margin -0.2 against 0: " in text
    )
    assert "| Sec. 3.4 |" in text
    assert "![Fig. 1 and 6: accuracy over the pre-training margin.](digits/margins.png)" in text
    assert "`fewshot-ext analyze variance --config digits/variance.yaml --sweep SWEEP --output OUTPUT`" in text
    missing = text.partition("Not yet measured:")[2]
    assert "`fewshot-ext analyze angles --data mnist --output OUTPUT`" in missing
    assert "analyze margins" not in missing


def test_only_what_is_between_the_markers_is_replaced(results, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"# Title\n\n{START}\nstale words\n{END}\n\nThe end.\n")
    first = page_with_report([results], page)
    assert first.startswith("# Title\n\n")
    assert first.endswith(f"{END}\n\nThe end.\n")
    assert "stale words" not in first
    page.write_text(first)
    assert page_with_report([results], page) == first


def test_a_page_without_a_place_for_findings(results, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="has no place for findings"):
        page_with_report([results], page)


def test_no_results_at_all(tmp_path):
    text = report([], tmp_path)
    assert text.count("- `fewshot-ext analyze ") == 9
    assert "verdict" not in text


def test_a_wrong_results_file_is_named(results):
    for text, message in (
        ("{", "does not hold the results of margins"),
        (json.dumps({"analysis": "shots", "rows": []}), "it holds the analysis 'shots'"),
        (json.dumps({"analysis": "margins"}), "does not hold the results of margins: content lacks 'rows'"),
    ):
        (results / "margins.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(results)


def test_tables_keep_their_rows(tmp_path):
    rows = [{"a": 1, "b": [1, 2]}, {"a": 2, "c": "x"}]
    write_table(tmp_path, "shots", rows, note="n")
    assert read_table(tmp_path, "shots") == {"analysis": "shots", "note": "n", "rows": rows}
    assert (tmp_path / "shots.csv").read_text() == "a,c\n1,\n2,x\n"


@pytest.mark.parametrize("rows", ["[]", '[{"loss": 1}]', '[{"loss": "cosine", "margin": "x", "seed": 0}]'])
def test_results_of_other_columns(rows, tmp_path, capsys):
    (tmp_path / "margins.json").write_text(f'{{"analysis": "margins", "rows": {rows}}}')
    assert findings.main(["--results", str(tmp_path), "--output", str(tmp_path / "page.md")]) == 2
    error = capsys.readouterr().err
    assert "do not hold what the names of their files say" in error
    assert len(error.splitlines()) == 1


def test_the_script_writes_a_page(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert findings.main(["--results", str(results), "--output", str(page)]) == 0
    assert "| verdict |" in page.read_text()
    assert capsys.readouterr().out.startswith("written:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "nowhere"], "results 'nowhere' is not a folder"),
        (["--results", "."], "holds no results file of an analysis"),
        (["--paper", "anti_collapse", "--results", "."], "holds no results file of an analysis"),
        (["--output", "nowhere/page.md"], "is in no folder that there is"),
        (["--paper", "other"], "paper must be 'negative_margin' or 'anti_collapse' or 'deepemd'"),
    ],
)
def test_what_the_script_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert findings.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("paper", PAPERS)
def test_the_committed_page_says_what_the_committed_numbers_say(paper):
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / f"{paper}.md").read_text(encoding="utf-8")
    folders = sorted(path for path in (docs / paper).glob("*") if path.is_dir())
    assert f"{START}\n\n{report(folders, docs, paper)}\n{END}" in page
