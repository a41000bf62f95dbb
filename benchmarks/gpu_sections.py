"""The GPU report from its first section to its last: shares of the time, its files, what happens when it is stopped."""

import importlib
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gpu_process
import harness
from gpu_comparison import Goal, tables
from gpu_process import Overdue, supervise
from harness import markdown_table

WORKER = [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))]
TESTS_SHARE = 3 / 8  # of the time where others want some too: three minutes of the usual eight
MACHINE_SECONDS = 150.0
LAST_SECONDS = 4.0  # kept back for ending children and writing files
REHEARSAL = "\n\n**A rehearsal on the CPU: its times say nothing about a GPU.**"
PACKAGE = "fewshot_ext"  # and how the names of its own contenders begin


class Stopped(BaseException):
    """By a signal. No error of the work itself, so nothing on the way should catch it."""

    def __init__(self, number: int) -> None:
        self.number = number


class NoDevice(Exception):
    """Torch cannot use the GPU that the driver shows."""


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # who asks again wants it at once
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Report:
    def __init__(self, options) -> None:
        self.options = options
        self.end = time.monotonic() + 60 * options.minutes - LAST_SECONDS
        self.state = "Incomplete: still running"
        self.device = ""  # as files are named after it; nothing is written before it is known
        self.preface = f"`{harness.command()}`" + (REHEARSAL if options.device == "cpu" else "")
        self.columns: dict[str, object] = {}  # of every CSV row
        self.sections = {"Goals": "Nothing is measured yet.\n"}
        self.rows: dict[str, list[dict]] = {}
        self.goals: dict[str, list[Goal]] = {}
        self.files: list[Path] = []
        self.rates: dict[str, float] = {}
        self.failed: list[str] = []  # what makes the exit code 1
        self.cut: list[str] = []  # sections that have spent their share of the time
        self.section = self.case = ""

    def run(self) -> int:
        state, code = "Complete", 0
        try:
            with signals_as_exceptions():
                self.all_sections()
        except NoDevice as error:
            print(f"gpu_report: {error}", file=sys.stderr)
            return 2
        except Stopped as stop:
            state, code = f"Incomplete: stopped by {signal.Signals(stop.number).name}", 128 + stop.number
        except Overdue:
            state = "Incomplete: out of time"
        except Exception as error:
            self.finish(f"Incomplete: {type(error).__name__}")
            raise
        self.finish(state)
        return code or (1 if self.failed else 0)

    def finish(self, state: str) -> None:
        if state != "Complete":
            state += f" in section {self.section}" + (f", case {self.case}" if self.case else "")
        elif self.cut:
            state = "Incomplete: out of time"
        self.state = state + (f"; not all of {', '.join(self.cut)}" if self.cut else "")
        if self.device:
            self.write()
        if self.goals:
            print(f"\n{self.sections['Goals']}")
        for failure in self.failed:
            print(f"FAILED {failure}")
        print(f"{self.state}. Written: {', '.join(map(str, self.files)) or 'nothing'}", flush=True)

    def all_sections(self) -> None:
        sections = ["sanitizer"] if self.options.sanitize else self.options.sections
        operators = [name for name in sections if name not in ("tests", "sanitizer")]
        self.start("machine")
        self.machine(["Machine", "Packages", *(["Rates"] if operators else [])])
        if "sanitizer" in sections:
            self.start("sanitizer")
            self.sanitizer()
        if "tests" in sections:
            self.start("tests")
            self.tests(TESTS_SHARE * 60 * self.options.minutes if operators else float("inf"))
        for index, name in enumerate(operators):
            self.start(name)
            self.operator(name, share=self.remaining() / (len(operators) - index))

    def start(self, section: str) -> None:
        self.section, self.case = section, ""
        print(f"[{self.remaining():.0f} s left] {section}", flush=True)

    def remaining(self) -> float:
        return self.end - time.monotonic()

    def deadline(self, share: float) -> float:
        """Of a section that may take ``share`` seconds where as much is left."""
        return min(time.monotonic() + share, self.end)

    def write(self, title: str = "", text: str = "") -> None:
        """The document with that section, and the rows of all operators."""
        if title:
            self.sections[title] = text
        parts = [f"# GPU report: {self.device}", self.preface, f"**{self.state}.**"]
        parts += [f"## {title}\n\n{text.rstrip()}" for title, text in self.sections.items()]
        harness.write_text(self.path("gpu_report_{}.md"), "\n\n".join(parts) + "\n")
        for operator, rows in self.rows.items():
            if rows:
                harness.write_csv(self.path(f"{operator}_{{}}.csv"), [{**row, **self.columns} for row in rows])

    def path(self, name: str) -> Path:
        directory = self.options.output_dir or Path(tempfile.gettempdir(), "gpu_report")
        if self.options.save and self.options.device != "cpu":
            directory = harness.RESULTS
        path = directory / name.format(re.sub(r"[^a-z0-9]+", "_", self.device.lower()).strip("_"))
        if path not in self.files:
            self.files.append(path)
        return path

    def events(self, module: str, jobs: list[str], share: float) -> Iterator[dict]:
        """What workers say of an operator's jobs, or of their own, until the share is spent; out of time for everything
        is an exception."""
        own = {name: getattr(self.options, name) for name in ("device", "quick", "seconds")}
        workers = supervise(WORKER, {"module": module, "rates": self.rates, **own}, jobs, self.deadline(share))
        try:
            with closing(workers):
                for event in workers:
                    self.case = event["job"]
                    if event["event"] == "failure" and self.device:
                        print(f"  {failure_text(event)}\n{event['output']}", flush=True)
                    yield event
        except Overdue:
            if self.remaining() < 1:
                raise
            self.cut.append(self.section)
            print("  the section's share of the time is spent", flush=True)

    def machine(self, jobs: list[str]) -> None:
        with closing(self.events("", jobs, MACHINE_SECONDS)) as events:
            for event in events:
                if event["event"] == "result":
                    found = event["result"]
                    self.rates.update(found.get("rates", {}))
                    self.columns.update(found.get("columns", {}))
                    self.device = self.columns["device"] + (" quick" if self.options.quick else "")
                    if "columns" not in found:  # the machine is known to who sits before it
                        print(found["text"], flush=True)
                    self.write(event["job"], found["text"])
                elif event["event"] in ("error", "failure") and not self.device:
                    raise NoDevice(f"torch cannot use the GPU: {event['reason']}")
                elif event["event"] in ("error", "failure"):
                    self.write(event["job"], f"Not known: {failure_text(event)}.\n")

    def tests(self, share: float) -> None:
        found = gpu_process.SuiteRun()
        command = gpu_process.pytest_command(gpu_process.SELECTED[self.options.device])
        try:
            gpu_process.run(found, command, self.deadline(share))
        finally:
            print(f"  {found.verdict()}", flush=True)
            if not found.passed:
                (self.cut if found.out_of_time else self.failed).append(f"tests ({found.verdict()})")
                harness.write_text(self.path("gpu_report_{}_tests.log"), "\n".join(found.log) + "\n")
            self.write("Tests", suite_section(found))

    def sanitizer(self) -> None:
        sanitizer = gpu_process.find_sanitizer()
        if sanitizer is None:
            where = "neither on the PATH nor in CUDA_HOME/bin nor in /usr/local/cuda/bin"
            self.failed.append(f"compute-sanitizer is {where}")
            self.write("compute-sanitizer", self.failed[-1] + "\n")
            return
        results = []
        for index, tool in enumerate(gpu_process.TOOLS):
            self.case = tool
            found = gpu_process.SuiteRun()
            command = gpu_process.sanitizer_command(sanitizer, tool)
            deadline = self.deadline(self.remaining() / (len(gpu_process.TOOLS) - index))
            try:
                gpu_process.run(found, command, deadline, **gpu_process.SANITIZER_ENVIRONMENT)
            finally:
                clean, summary = gpu_process.sanitizer_verdict(found)
                results.append([tool, "clean" if clean else "**not clean**", summary, found.verdict()])
                print(f"  {tool}: {summary}; {found.verdict()}", flush=True)
                if not clean:
                    self.failed.append(f"{tool}: {summary}")
                harness.write_text(self.path(f"gpu_report_{{}}_{tool}.log"), "\n".join(found.log) + "\n")
                self.write("compute-sanitizer", markdown_table(["tool", "", "summary", "tests"], results))

    def operator(self, name: str, share: float) -> None:
        module = importlib.import_module(f"gpu_{name}")
        jobs = module.jobs(self.options.quick)
        rows = self.rows[name] = []
        troubles, open_jobs = [], list(jobs)
        try:
            with closing(self.events(module.__name__, jobs, share)) as events:
                for event in events:
                    if event["event"] == "result":
                        rows += event["result"]
                        print(f"  {event['job']}: {headline(event['result'])}", flush=True)
                    elif event["event"] in ("error", "failure"):
                        troubles.append(failure_text(event))
                        if event.get("contender", "") == "" or event["contender"].startswith(PACKAGE):
                            self.failed.append(f"{name}: {troubles[-1]}")
                    elif event["event"] == "done":
                        open_jobs.remove(event["job"])
                        self.show(module, name, rows, troubles, open_jobs)
        finally:
            self.show(module, name, rows, troubles, open_jobs)
            self.failed += [f"{name}: {text}" for text in wrong_results(rows)]

    def show(self, module, name: str, rows: list[dict], troubles: list[str], open_jobs: list[str]) -> None:
        parts = [f"Not measured: {'; '.join(open_jobs)}.\n"] if open_jobs else []
        if troubles:
            parts.append(markdown_table(["what went wrong"], [[trouble] for trouble in troubles]))
        self.goals[name] = module.goals(rows)
        self.sections["Goals"] = goals_table(goal for goals in self.goals.values() for goal in goals)
        self.write(name, "\n".join([*parts, module.TEXT + tables(rows, module.caption)]))


def goals_table(goals: Iterable[Goal]) -> str:
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    return markdown_table(["goal", "measured", ""], [[goal.goal, goal.measured, verdicts[goal.met]] for goal in goals])


def block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


def suite_section(found: gpu_process.SuiteRun) -> str:
    parts = [found.verdict() + "\n"]
    if found.failures:
        parts.append(markdown_table(["failed"], [[failure] for failure in found.failures[:30]]))
    if len(found.failures) > 30:
        parts.append(f"and {len(found.failures) - 30} more\n")
    if not found.passed and not found.failures:
        parts.append(block("\n".join(found.log[-15:])))
    return "\n".join(parts)


def failure_text(event: dict) -> str:
    at = [event["job"], event.get("contender", ""), event.get("phase", "")]
    return f"{', '.join(part for part in at if part)}: {event['reason']}"


def headline(rows: list[dict]) -> str:
    """The medians of the first kind of timing there is."""
    kinds = [row["timing"] for row in rows if row["timing"]]
    timed = [f"{row['contender']} {row['p50_ms']}" for row in rows if kinds and row["timing"] == kinds[0]]
    return f"{kinds[0]}, ms: {', '.join(timed)}" if timed else "nothing timed"


def wrong_results(rows: list[dict]) -> list[str]:
    """Of this package: what is wrong with a peer is its own affair, and a forced kernel may refuse a problem."""
    return [
        f"{row['contender']} at {row['case']}: {row['note']}"
        for row in rows
        if row["contender"].startswith(PACKAGE)
        and ("wrong" in row["note"] or (row["contender"] == PACKAGE and not row["timing"]))
    ]
