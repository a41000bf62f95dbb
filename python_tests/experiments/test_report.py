import json
from pathlib import Path

import pytest

from fewshot_ext.experiments.margins import write_margins
from fewshot_ext.experiments.report import END, PAPERS, START, page_with_report, read_results, report
from fewshot_ext.experiments.tables import read_table, write_table
from fewshot_ext.experiments.variance import VarianceMeasurement, write_variance

HEAD = {"data": {"name": "digits", "sha256": "0"}, "versions": {"torch": "2"}}


@pytest.fixture
def results(trained, tmp_path):
    folder = tmp_path / "docs" / "digits"
    folder.mkdir(parents=True)
    write_margins(folder, trained.rows, **HEAD)
    write_variance(folder, trained.remeasure(VarianceMeasurement()).run(), **HEAD)
    return folder


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


@pytest.mark.parametrize("paper", PAPERS)
def test_the_committed_page_says_what_the_committed_numbers_say(paper):
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / f"{paper}.md").read_text(encoding="utf-8")
    folders = sorted(path for path in (docs / paper).glob("*") if path.is_dir())
    assert f"{START}\n\n{report(folders, docs, paper)}\n{END}" in page
