"""Pages of findings: what is written between the markers, and what is refused."""

import doctest
import importlib
import re
import shutil

import findings
import pytest
import torch
from findings import DOCS, END, PAPERS, START, committed_results, page_with_findings
from verdicts import read_table

from fewshot_ext.cli import main

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
    text = page_with_findings("negative_margin", [results], tmp_path / "docs" / "page.md")
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
    first = page_with_findings("negative_margin", [results], page)
    assert first.startswith("# Title\n\n")
    assert first.endswith(f"{END}\n\nThe end.\n")
    assert "stale words" not in first
    page.write_text(first)
    assert page_with_findings("negative_margin", [results], page) == first


def test_a_page_without_a_place_for_findings(results, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="has no place for findings"):
        page_with_findings("negative_margin", [results], page)


def test_no_results_at_all(tmp_path):
    text = findings.findings("negative_margin", [], tmp_path)
    assert text.count("- `fewshot-ext analyze ") == 10
    assert "verdict" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not hold the results of margins"),
        ('{"analysis": "shots", "rows": []}', "it holds the analysis 'shots'"),
        ('{"analysis": "margins"}', "does not hold the results of margins: content lacks 'rows'"),
        (f'{{"analysis": "margins", "rows": {"[" * 100_000 + "]" * 100_000}}}', r"margins\.json does not hold"),
    ],
    ids=["text", "another", "rows", "deep"],
)
def test_a_wrong_results_file_is_named(text, message, tmp_path):
    (tmp_path / "margins.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path, "margins")
    with pytest.raises(ValueError, match=message):
        page_with_findings("negative_margin", [tmp_path], tmp_path / "page.md")


@pytest.mark.parametrize("rows", ["[]", '[{"loss": 1}]', '[{"loss": "cosine", "margin": "x", "seed": 0}]'])
def test_results_of_other_columns(rows, tmp_path, capsys):
    (tmp_path / "margins.json").write_text(f'{{"analysis": "margins", "rows": {rows}}}')
    assert findings.main(["negative_margin", "--results", str(tmp_path), "--output", str(tmp_path / "page.md")]) == 2
    error = capsys.readouterr().err
    assert "do not hold what the names of their files say" in error
    assert len(error.splitlines()) == 1


def test_the_script_writes_a_page(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert findings.main(["negative_margin", "--results", str(results), "--output", str(page)]) == 0
    assert "| verdict |" in page.read_text()
    assert capsys.readouterr().out == f"written: {page}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["negative_margin", "--results", "nowhere"], "results 'nowhere' is not a folder"),
        (["negative_margin", "--results", "."], "results '.' holds none of the results files margins.json, "),
        (["anti_collapse", "--results", "."], "results '.' holds none of the results files collapse.json"),
        (["deepemd", "--output", "nowhere/page.md"], "output 'nowhere/page.md' is in no folder that there is"),
    ],
)
def test_what_the_script_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert findings.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_paper_that_there_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        findings.main(["other"])
    assert "invalid choice: 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("paper", PAPERS)
def test_the_committed_page_says_what_the_committed_numbers_say(paper):
    page = DOCS / f"{paper}.md"
    assert page_with_findings(paper, committed_results(paper), page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("paper", PAPERS)
def test_the_commands_on_the_pages_are_understood(paper):
    page = (DOCS / f"{paper}.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python docs/tools/findings.py (.*)$", page, re.MULTILINE)
    assert commands
    assert {findings.parse(command.split()).paper for command in commands} == {paper}


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "tools").glob("*.py") if path.stem != "overview"))
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
