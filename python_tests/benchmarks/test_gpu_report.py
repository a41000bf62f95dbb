"""The GPU report where there is no GPU: arguments, time, what it leaves when it is stopped. All times are made up."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import gpu_margin_softmax
import gpu_process
import gpu_report
import gpu_sections
import gpu_worker
import pytest
from gpu_comparison import Goal
from gpu_process import Overdue
from gpu_sections import goals_table

BENCHMARKS = Path(gpu_report.__file__).parent


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
        (["--minutes", "nan"], "--minutes: expected a positive number, got nan"),
        (["--seconds", "-1"], "--seconds: expected a positive number, got -1.0"),
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
        (["--sanitize", "--only", "tests"], "--sanitize: expected without --only and --skip-tests"),
        (["--sanitize", "--skip-tests"], "--sanitize: expected without --only and --skip-tests"),
        (["--skip-tests", "--only", "tests"], "--skip-tests: expected without --only tests"),
        (["--fast"], "unrecognized arguments: --fast"),
    ),
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_report.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sections",
    (
        ([], ["tests", *gpu_report.OPERATORS]),
        (["--skip-tests"], list(gpu_report.OPERATORS)),
        (["--only", "tests"], ["tests"]),
        (["--only", "margin_softmax", "tests"], ["tests", "margin_softmax"]),
    ),
)
def test_sections_come_in_their_order(arguments, sections):
    assert gpu_report.parse(arguments).sections == sections


def test_help_hides_what_only_rehearses():
    text = gpu_report.parser().format_help()
    assert "--device" not in text
    assert "--sanitize" in text and "It builds nothing" in " ".join(text.split())


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--output-dir", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gpu_report: torch cannot use the GPU: ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_package_that_is_not_there_ends_it_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gpu_sections", None)
    assert gpu_report.main([]) == 2
    assert "cannot import what it measures" in capsys.readouterr().err


def test_goals_read_met_not_met_and_not_measured():
    goals = [Goal("fast", "1 us", True), Goal("small", "9 GiB", False), Goal("first", "", None)]
    assert goals_table(goals).splitlines()[2:] == [
        "| fast | 1 us | met |",
        "| small | 9 GiB | **not met** |",
        "| first |  | not measured |",
    ]


FACTS = {"columns": {"device": "Made Up GPU", "torch": "9.9"}, "text": "L2 cache"}


def row(contender="fewshot_ext", timing="graph", note="", case="256, 512, 64 in float32"):
    shared = {
        "input_sets": 2,
        "gemm_ms": "0.01000",
        "floor_ms": "0.01000",
        "extra_memory_mib": "",
        "relative_error": "",
    }
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "0.02000" if timing else "")
    return {"case": case, "contender": contender, "timing": timing, **times, "times_floor": "", **shared, "note": note}


class Workers:
    """Stands in for gpu_process.supervise."""

    def __init__(self):
        rates = {"rates": {"copy_gb_per_s": 3.0}, "text": "fast"}
        self.results = {"Machine": FACTS, "Packages": {"text": "no cut_cross_entropy"}, "Rates": rates}
        self.troubles = {}  # job -> an event, or an exception to raise
        self.orders = []

    def __call__(self, command, settings, jobs, deadline):
        self.orders.append((settings, jobs))
        for job in jobs:
            yield {"event": "begin", "job": job, "contender": "", "phase": "preparation", "patience": 1}
            trouble = self.troubles.get(job)
            if isinstance(trouble, BaseException):
                raise trouble
            if callable(trouble):
                trouble()
            elif trouble:
                yield {"job": job, "output": "what it said", **trouble}
            if job in self.results:
                yield {"event": "result", "job": job, "result": self.results[job]}
            yield {"event": "done", "job": job}


JOBS = ["256,512,64,float32", "256,640,351,float32", "512,512,100000,bfloat16"]


@pytest.fixture
def workers(monkeypatch):
    found = Workers()
    found.results.update({job: [row(case=gpu_margin_softmax.title(job))] for job in JOBS})
    monkeypatch.setattr(gpu_sections, "supervise", found)
    monkeypatch.setattr(gpu_margin_softmax, "jobs", lambda quick: JOBS)

    def run(suite, command, deadline, **variables):
        suite.counts, suite.selected, suite.returncode = Counter(PASSED=5), 5, 0

    monkeypatch.setattr(gpu_process, "run", run)
    return found


@pytest.fixture
def report(tmp_path, workers, monkeypatch):
    """Reports on the tests and one operator."""
    monkeypatch.setattr(gpu_report, "SECTIONS", ("tests", "margin_softmax"))

    def run(*arguments):
        options = gpu_report.parse(["--output-dir", str(tmp_path), *arguments])
        code = gpu_sections.Report(options).run()
        document = tmp_path / "gpu_report_made_up_gpu.md"
        table = tmp_path / "margin_softmax_made_up_gpu.csv"
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        return types.SimpleNamespace(code=code, text=document.read_text() if document.exists() else "", rows=rows)

    return run


def test_a_report_has_every_section(report, workers, capsys):
    found = report()
    assert found.code == 0
    assert "**Complete.**" in found.text
    titles = [line[3:] for line in found.text.splitlines() if line.startswith("## ")]
    assert titles == ["Goals", "Machine", "Packages", "Rates", "Tests", "margin_softmax"]
    assert "## Machine\n\nL2 cache\n" in found.text and "## Packages\n\nno cut_cross_entropy\n" in found.text
    assert "5 of 5 selected tests ran" in found.text
    assert "| 256, 512, 64 in float32: at most 25 us in a CUDA graph | 20.0 us | met |" in found.text
    assert [row["torch"] for row in found.rows] == ["9.9"] * 3
    assert workers.orders[-1][0]["rates"] == {"copy_gb_per_s": 3.0}  # the operators' floors need them
    told = capsys.readouterr().out
    assert "no cut_cross_entropy" in told
    assert told.rstrip().endswith("margin_softmax_made_up_gpu.csv")


def test_sections_that_nobody_asked_for_are_left_out(report, workers):
    found = report("--only", "tests")
    assert "## Tests" in found.text and "## Rates" not in found.text
    assert [jobs for _, jobs in workers.orders] == [["Machine", "Packages"]]


@pytest.mark.parametrize("arguments, seconds", (([], 180), (["--only", "tests"], 476), (["--minutes", "16"], 360)))
def test_tests_get_a_share_of_the_time_and_all_of_it_alone(arguments, seconds, report, monkeypatch):
    given = []

    def run(suite, command, deadline, **variables):
        given.append(deadline - time.monotonic())
        suite.returncode = 0

    monkeypatch.setattr(gpu_process, "run", run)
    report(*arguments)
    assert given == [pytest.approx(seconds, abs=2)]


def test_the_time_that_runs_out_leaves_what_was_finished(report, workers, monkeypatch, capsys):
    workers.troubles[JOBS[2]] = Overdue()
    monkeypatch.setattr(gpu_sections.Report, "remaining", lambda self: 0.5)
    found = report()
    assert found.code == 0
    state = f"Incomplete: out of time in section margin_softmax, case {JOBS[2]}"
    assert f"**{state}.**" in found.text
    assert f"Not measured: {JOBS[2]}." in found.text
    assert len(found.rows) == 2
    assert f"{state}. Written: " in capsys.readouterr().out


def test_a_share_that_is_spent_ends_its_section_alone(report, workers):
    workers.troubles["Rates"] = Overdue()
    found = report()
    assert found.code == 0
    assert "**Incomplete: out of time; not all of machine.**" in found.text
    assert len(found.rows) == 3


def test_rates_that_cannot_be_measured_are_said_and_the_rest_goes_on(report, workers):
    del workers.results["Rates"]
    workers.troubles["Rates"] = {"event": "error", "reason": "RuntimeError: no memory"}
    found = report()
    assert found.code == 0 and len(found.rows) == 3
    assert "## Rates\n\nNot known: Rates: RuntimeError: no memory.\n" in found.text


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_leaves_what_was_finished(number, report, workers, capsys):
    workers.troubles[JOBS[1]] = lambda: (os.kill(os.getpid(), number), time.sleep(5))
    before = signal.getsignal(number)
    found = report()
    assert found.code == 128 + number
    assert f"Incomplete: stopped by {number.name} in section margin_softmax, case {JOBS[1]}." in found.text
    assert f"Not measured: {JOBS[1]}; {JOBS[2]}." in found.text
    assert len(found.rows) == 1
    assert signal.getsignal(number) is before
    assert "Written: " in capsys.readouterr().out


def test_a_signal_before_anything_was_found_writes_nothing(report, workers, capsys):
    workers.troubles["Machine"] = lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))
    assert report().code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM in section machine, case Machine. Written: nothing" in capsys.readouterr().out


def test_a_signal_during_the_tests_keeps_their_count(report, monkeypatch):
    def run(suite, command, deadline, **variables):
        suite.counts, suite.selected, suite.cut = Counter(PASSED=2), 9, "stopped"
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(20)

    monkeypatch.setattr(gpu_process, "run", run)
    found = report()
    assert found.code == 128 + signal.SIGTERM
    assert "2 of 9 selected tests ran in 0 s: 2 passed; cut: stopped" in found.text


def test_tests_that_fail_are_reported_and_the_rest_goes_on(report, monkeypatch, tmp_path):
    def run(suite, command, deadline, **variables):
        suite.counts, suite.selected, suite.returncode = Counter(FAILED=1), 1, 1
        suite.failures, suite.log = ["a.py::test - no"], ["the log"]

    monkeypatch.setattr(gpu_process, "run", run)
    found = report()
    assert found.code == 1
    assert "| a.py::test - no |" in found.text and len(found.rows) == 3
    assert (tmp_path / "gpu_report_made_up_gpu_tests.log").read_text() == "the log\n"


def test_tests_that_only_ran_out_of_time_make_the_report_incomplete(report, monkeypatch):
    def run(suite, command, deadline, **variables):
        suite.counts, suite.selected, suite.cut, suite.out_of_time = Counter(PASSED=3), 9, "out of time", True

    monkeypatch.setattr(gpu_process, "run", run)
    found = report()
    assert found.code == 0
    assert "**Incomplete: out of time; not all of tests (3 of 9 selected tests ran" in found.text


@pytest.mark.parametrize("contender, code", (("fewshot_ext (one launch)", 1), ("", 1), ("liger-kernel (no margin)", 0)))
def test_a_worker_that_died_is_reported_and_counts_where_it_is_our_doing(contender, code, report, workers, capsys):
    trouble = {"event": "failure", "contender": contender, "phase": "check", "reason": "no sign of life for 60 s"}
    workers.troubles[JOBS[0]] = trouble
    found = report()
    assert found.code == code
    at = ", ".join(part for part in (JOBS[0], contender, "check") if part)
    assert f"| {at}: no sign of life for 60 s |" in found.text
    assert len(found.rows) == 3
    assert "what it said" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, code",
    (
        (row(timing="", note="wrong, not timed: allowed is 1e-04"), 1),
        (row(timing="", note="RuntimeError: no kernel image"), 1),
        (row("fewshot_ext (chunked)", note="no graph: its replay is wrong by nan"), 1),
        (row("fewshot_ext (one launch)", timing="", note="one_launch does not take 70000 samples"), 0),
        (row("liger-kernel (no margin)", timing="", note="wrong, not timed: allowed is 1e-04"), 0),
    ),
)
def test_wrong_results_of_this_package_fail_the_report(wrong, code, report, workers):
    workers.results[JOBS[0]] = [row(), wrong]
    assert report().code == code


def test_a_gpu_that_torch_cannot_use_ends_it(report, workers, capsys):
    workers.results.clear()
    workers.troubles["Machine"] = {"event": "error", "reason": "RuntimeError: driver too old"}
    assert report().code == 2
    assert "gpu_report: torch cannot use the GPU: RuntimeError: driver too old" in capsys.readouterr().err


def test_an_error_of_the_report_itself_is_raised_and_leaves_the_files(report, workers, tmp_path):
    workers.troubles[JOBS[1]] = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        report()
    text = (tmp_path / "gpu_report_made_up_gpu.md").read_text()
    assert f"**Incomplete: KeyError in section margin_softmax, case {JOBS[1]}.**" in text


def test_quick_runs_and_rehearsals_do_not_overwrite_results(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(gpu_sections.harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_sections.tempfile, "gettempdir", lambda: str(tmp_path))
    gpu_sections.Report(gpu_report.parse(["--only", "tests"])).run()
    assert not (tmp_path / "results").exists()
    for arguments in ([], ["--quick"], ["--device", "cpu"]):
        gpu_sections.Report(gpu_report.parse(["--only", "tests", "--save", *arguments])).run()
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "gpu_report_made_up_gpu.md",
        "gpu_report_made_up_gpu_quick.md",
    ]
    rehearsal = (tmp_path / "gpu_report" / "gpu_report_made_up_gpu.md").read_text()
    assert "**A rehearsal on the CPU: its times say nothing about a GPU.**" in rehearsal


def test_a_missing_sanitizer_is_said(report, monkeypatch):
    monkeypatch.setattr(gpu_process, "find_sanitizer", lambda: None)
    found = report("--sanitize")
    assert found.code == 1
    assert "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin" in found.text
    assert "## Tests" not in found.text


def test_each_sanitizer_has_a_line_and_a_log(report, monkeypatch, tmp_path):
    def run(suite, command, deadline, **variables):
        errors = 3 if "racecheck" in command else 0
        suite.counts, suite.selected, suite.returncode = Counter(PASSED=2), 2, 0
        suite.log = [f"========= ERROR SUMMARY: {errors} errors"]

    monkeypatch.setattr(gpu_process, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    monkeypatch.setattr(gpu_process, "run", run)
    found = report("--sanitize")
    assert found.code == 1
    lines = [line for line in found.text.splitlines() if "ERROR" not in line and "errors" in line]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| memcheck", "clean", "0 errors"],
        ["| racecheck", "**not clean**", "3 errors"],
        ["| synccheck", "clean", "0 errors"],
        ["| initcheck", "clean", "0 errors"],
    ]
    assert len(list(tmp_path.glob("*.log"))) == 4


def bench(left_out=None):
    return types.SimpleNamespace(begin=lambda *a, **k: None, left_out=lambda *a: left_out)


def test_packages_that_cannot_be_imported_are_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(gpu_worker, "PACKAGES", {"csv": "tables", "no_such_module": "the peer"})
    missing = gpu_worker.packages(bench())["text"]
    assert "| csv |" not in missing
    reason = "ModuleNotFoundError: No module named 'no_such_module'; without it: the peer"
    assert f"| no_such_module | {reason} |" in missing


def test_a_package_whose_import_killed_a_worker_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(gpu_worker, "PACKAGES", {"csv": "tables"})
    assert "| csv | the process died of SIGSEGV" in gpu_worker.packages(bench("the process died of SIGSEGV"))["text"]


@pytest.mark.parametrize(
    "answer, expected",
    (
        ("580.1, 345 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31, Default, Disabled", {"clocks.sm": "345 MHz"}),
        ("No devices were found", {"clocks": "not readable: nvidia-smi said 'No devices were found'"}),
    ),
)
def test_clocks_are_read_or_said_to_be_unreadable(answer, expected, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{answer}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    address = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    found = gpu_worker.nvidia_smi(address)
    assert found | expected == found


def rehearse(output, *arguments):
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--device", "cpu", "--quick", "--output-dir", output]
    return [*map(str, command), *arguments]


@pytest.mark.slow
def test_rehearsal_from_end_to_end(tmp_path):
    done = subprocess.run(rehearse(tmp_path, "--minutes", "5"), capture_output=True, text=True, timeout=330)
    assert done.returncode == 0, done.stdout + done.stderr
    (document,) = tmp_path.glob("*.md")
    text = document.read_text()
    assert "**Complete.**" in text and "A rehearsal on the CPU" in text
    assert len(list(tmp_path.glob("*.csv"))) == len(gpu_report.OPERATORS)
    for name in gpu_report.OPERATORS:
        operator = importlib.import_module(f"gpu_{name}")
        (table,) = tmp_path.glob(f"{name}_*.csv")
        rows = list(csv.DictReader(table.open()))
        cases = {row["case"] for row in rows}
        assert cases == {operator.title(job) for job in operator.jobs(quick=True)}
        timed = [row for row in rows if row["contender"] == "fewshot_ext"]
        assert [row["timing"] for row in timed] == ["stream", "host"] * len(cases)
        assert all(float(row["p50_ms"]) > 0 for row in timed)


@pytest.mark.slow
def test_rehearsal_that_is_stopped_leaves_its_files_and_no_process(tmp_path):
    command, marked = rehearse(tmp_path, "--only", "margin_softmax"), {**os.environ, "REHEARSAL": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=marked) as process:
        for line in process.stdout:
            if "ms: fewshot_ext" in line:  # the first case is finished
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Incomplete: stopped by SIGTERM in section margin_softmax" in rest
    (table,) = tmp_path.glob("*.csv")
    assert len(list(csv.DictReader(table.open()))) > 1
    assert not [process for process in Path("/proc").glob("[0-9]*") if f"REHEARSAL={tmp_path}" in environment(process)]


def environment(process):
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
