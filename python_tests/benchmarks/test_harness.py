"""Benchmarks write only what they are asked to save."""

import csv
from types import SimpleNamespace

import harness
import pytest


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [([], []), (["--save"], ["loss.csv", "loss.md"]), (["--save", "PLACE/mine.csv"], ["mine.csv", "mine.md"])],
)
def test_files_are_written_with_save_alone(arguments, written, results, capsys):
    options = harness.parser("A benchmark.", results="loss").parse_args(
        [argument.replace("PLACE", str(results)) for argument in arguments]
    )
    harness.report("| time |", [{"time": 1}, {"time": 2, "note": "slow"}], options.save)
    assert capsys.readouterr().out == "| time |\n"
    assert sorted(path.name for path in results.rglob("*")) == written
    for path in results.glob("*.csv"):
        assert list(csv.DictReader(path.open())) == [{"time": "1", "note": ""}, {"time": "2", "note": "slow"}]
        assert path.with_suffix(".md").read_text() == "| time |"


@pytest.mark.parametrize("save", [["--save"], ["--save", "mine.csv"]])
def test_the_caption_is_the_command_without_save(save, monkeypatch):
    monkeypatch.setattr(harness.sys, "argv", ["bench.py", *save, "--seconds", "8"])
    assert harness.command().endswith("bench.py --seconds 8")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    harness.write_text(path, "first")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        harness.write_text(path, "second")
    assert path.read_text() == "first"


def test_cells_of_a_table_hold_anything():
    assert harness.markdown_table(["a"], [["x|y\nz"], [1]]).splitlines()[2:] == ["| x\\|y z |", "| 1 |"]


@pytest.mark.parametrize(
    ("seconds", "at_least", "calls"),
    [(0.03, 0.1, 1 + 4), (0.5, 0.1, 1 + 1), (1.0, 0.1, 1), (0.03, 0, 1)],
)
def test_a_quick_call_is_repeated_and_a_slow_one_is_not(seconds, at_least, calls, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: sum(now)))
    assert harness.wall_clock(lambda: now.append(seconds), at_least) == pytest.approx(1e3 * seconds)
    assert len(now) - 1 == calls
