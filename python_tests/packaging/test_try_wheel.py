"""The table of environments: a new row replaces the one of its pair, and a command that fails is a row, not an end."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("try_wheel", Path(__file__).with_name("try_wheel.py"))
try_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(try_wheel)

PAGE = f"before\n{try_wheel.START}\n{try_wheel.END}\nafter\n"


def row(python, torch, tests="9 passed"):
    return (python, torch, "loaded", "agree", tests, "2026-01-01")


def test_rows_are_sorted_by_version_and_a_later_one_replaces_the_earlier():
    page = PAGE
    rows = [row("3.12.1", "2.15.0"), row("3.9.1", "2.11.0"), row("3.12.1", "2.11.0+cpu"), row("3.12.9", "2.15.0+cu130")]
    for new in rows:
        page = try_wheel.with_row(page, new)
    assert try_wheel.rows_of(page) == [rows[1], rows[2], rows[3]]
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")


def test_page_without_a_place_for_the_table():
    with pytest.raises(SystemExit, match="the page has no place for a table"):
        try_wheel.with_row("# A page\n", row("3.12", "2.11.0"))


def test_python_that_is_not_there_is_a_row(tmp_path):
    wheel = tmp_path / "fewshot_ext.whl"
    made = try_wheel.try_pair(wheel, "python3.999", "torch", tmp_path)
    assert made[:5] == ("3.999", "", "not tried", "not tried", "not tried")
    page = try_wheel.with_row(try_wheel.with_row(PAGE, made), row("3.12.1", "2.11.0"))
    assert try_wheel.rows_of(page) == [row("3.12.1", "2.11.0"), made]
    page = try_wheel.with_row(page, row("3.999.0", "2.11.0"))
    assert try_wheel.rows_of(page) == [row("3.12.1", "2.11.0"), row("3.999.0", "2.11.0")]


def test_install_that_fails_is_a_row_and_the_exit_status(tmp_path, monkeypatch, capsys):
    def run(*command, **settings):
        if "install" in command:
            raise try_wheel.Failure("ERROR: no such wheel")
        return "Python 3.12.1\n"

    monkeypatch.setattr(try_wheel, "run", run)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit) as finished:
        try_wheel.main(["some.whl", "--python", sys.executable, "--torch", "torch==2.11.0", "--page", str(page)])
    assert finished.value.code
    assert "| 3.12.1 | 2.11.0 | **failed**: ERROR: no such wheel |" in capsys.readouterr().out
    assert "ERROR: no such wheel" in page.read_text()


def test_last_line_of_a_command_is_what_failed(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with pytest.raises(try_wheel.Failure, match=r"^SystemExit: at last$|^at last$"):
        try_wheel.run(sys.executable, "-c", "print('first'); raise SystemExit('at last')")
