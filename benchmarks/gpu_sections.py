"""The GPU report from its first section to its last: order, shares of the time, and what happens when it is stopped."""

import importlib
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gpu_process
import harness
from gpu_comparison import Goal, table
from gpu_process import Budget, Overdue, supervise

WORKER = [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))]
TESTS_SHARE = 3 / 8  # of the time where others want some too: three minutes of the usual eight
MACHINE_SECONDS = 120.0
LAST_SECONDS = 4.0  # kept back for ending children and writing files
RATES_SECONDS = 60.0
PACKAGE = "fewshot_ext"  # and how the names of its own contenders begin
RATES_TEXT = """A large device-to-device copy, bytes read plus bytes written, and large square products.

"""


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
        self.budget = Budget(60 * options.minutes - LAST_SECONDS)
        self.document: Document | None = None
        self.goals: list[Goal] = []
        self.rates: dict[str, float] = {}
        self.failed: list[str] = []  # what makes the exit code 1
        self.cut: list[str] = []  # sections that have spent their share of the time
        self.section = self.case = ""

    def run(self) -> int:
        try:
            with signals_as_exceptions():
                self.all_sections()
        except NoDevice as error:
            print(f"gpu_report: {error}", file=sys.stderr)
            return 2
        except Stopped as stop:
            return self.end(f"Incomplete: stopped by {signal.Signals(stop.number).name}", 128 + stop.number)
        except Overdue:
            return self.end("Incomplete: out of time", 0)
        except Exception as error:
            self.end(f"Incomplete: {type(error).__name__}", 1)
            raise
        return self.end("Complete", 0)

    def end(self, state: str, code: int) -> int:
        if state != "Complete":
            state += f" in section {self.section}" + (f", case {self.case}" if self.case else "")
        elif self.cut:
            state = "Incomplete: out of time"
        if self.cut:
            state += f"; not all of {', '.join(self.cut)}"
        files = []
        if self.document is not None:
            self.document.state = f"{state}."
            self.document.write()
            files = self.document.files
        if self.goals:
            print(f"\n{goals_table(self.goals)}")
        for failure in self.failed:
            print(f"FAILED {failure}")
        print(f"{state}. Written: {', '.join(map(str, files)) or 'nothing'}", flush=True)
        return code or (1 if self.failed else 0)

    def all_sections(self) -> None:
        self.start("machine")
        self.machine()
        if self.options.sanitize:
            self.start("sanitizer")
            self.sanitizer()
            return
        operators = [name for name in self.options.sections if name != "tests"]
        if "tests" in self.options.sections:
            self.start("tests")
            self.tests(TESTS_SHARE * 60 * self.options.minutes if operators else float("inf"))
        if operators:
            self.start("rates")
            self.measure_rates()
        for index, name in enumerate(operators):
            self.start(name)
            self.operator(name, share=self.budget.remaining() / (len(operators) - index))

    def start(self, section: str) -> None:
        self.section, self.case = section, ""
        print(f"[{self.budget.remaining():.0f} s left] {section}", flush=True)

    def write(self, title: str, text: str) -> None:
        self.document.sections[title] = text
        self.document.write()

    def events(self, module: str, jobs: list[str], share: float) -> Iterator[dict]:
        """What workers say of the jobs, until the share is spent; out of time for everything is an exception."""
        settings = {
            "module": module,
            "device": self.options.device,
            "quick": self.options.quick,
            "seconds": self.options.seconds,
            "rates": self.rates,
        }
        workers = supervise(WORKER, settings, jobs, self.budget.deadline(share))
        try:
            with closing(workers):
                for event in workers:
                    self.case = event["job"]
                    if event["event"] == "failure" and self.document is not None:
                        print(f"  {failure_text(event)}\n{event['output']}", flush=True)
                    yield event
        except Overdue:
            if self.budget.remaining() < 1:
                raise
            self.cut.append(self.section)
            print("  the section's share of the time is spent", flush=True)

    def machine(self) -> None:
        missing: dict[str, str] = {}
        with closing(self.events("gpu_worker", ["facts", "packages"], MACHINE_SECONDS)) as events:
            for event in events:
                if event["event"] == "result" and event["job"] == "facts":
                    self.open_document(event["result"])
                elif event["event"] == "result":
                    missing = event["result"]
                elif event["event"] in ("error", "failure") and self.document is None:
                    raise NoDevice(f"torch cannot use the GPU: {event['reason']}")
        for package, reason in missing.items():
            print(f"  cannot import {package}: {reason}", flush=True)
        text = table(["could not import", "reason"], missing.items()) if missing else "Every package was imported.\n"
        self.write("Packages", text)

    def open_document(self, facts: dict) -> None:
        rehearsal, quick = self.options.device == "cpu", self.options.quick
        directory = self.options.output_dir or Path(tempfile.gettempdir(), "gpu_report")
        if self.options.save and not rehearsal:
            directory = harness.RESULTS
        preface = f"`{harness.command()}`"
        if rehearsal:
            preface += "\n\n**A rehearsal on the CPU: its times say nothing about a GPU.**"
        self.document = Document(directory, facts["columns"]["device"] + (" quick" if quick else ""), preface)
        self.document.columns = facts["columns"]
        self.document.sections["Goals"] = "Nothing is measured yet.\n"
        self.write("Machine", table(["", ""], facts["details"].items()) + "\n" + code_block(facts["environment"]))

    def tests(self, share: float) -> None:
        found = gpu_process.SuiteRun()
        command = gpu_process.pytest_command(gpu_process.SELECTED[self.options.device])
        try:
            gpu_process.run(found, command, self.budget.deadline(share))
        finally:
            print(f"  {found.verdict()}", flush=True)
            if not found.passed:
                (self.cut if found.out_of_time else self.failed).append(f"tests ({found.verdict()})")
                self.document.file(f"gpu_report_{self.document.name}_tests.log", "\n".join(found.log) + "\n")
            self.write("Tests", suite_section(found))

    def sanitizer(self) -> None:
        sanitizer = gpu_process.find_sanitizer()
        if sanitizer is None:
            self.failed.append(
                "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin nor in /usr/local/cuda/bin"
            )
            self.write("compute-sanitizer", self.failed[-1] + "\n")
            return
        results = []
        for index, tool in enumerate(gpu_process.TOOLS):
            self.case = tool
            found = gpu_process.SuiteRun()
            share = self.budget.remaining() / (len(gpu_process.TOOLS) - index)
            try:
                gpu_process.run(
                    found,
                    gpu_process.sanitizer_command(sanitizer, tool),
                    self.budget.deadline(share),
                    **gpu_process.SANITIZER_ENVIRONMENT,
                )
            finally:
                clean, summary = gpu_process.sanitizer_verdict(found)
                results.append([tool, "clean" if clean else "**not clean**", summary, found.verdict()])
                print(f"  {tool}: {summary}; {found.verdict()}", flush=True)
                if not clean:
                    self.failed.append(f"{tool}: {summary}")
                self.document.file(f"gpu_report_{self.document.name}_{tool}.log", "\n".join(found.log) + "\n")
                self.write("compute-sanitizer", table(["tool", "", "summary", "tests"], results))

    def measure_rates(self) -> None:
        reasons = []
        with closing(self.events("gpu_worker", ["rates"], RATES_SECONDS)) as events:
            for event in events:
                if event["event"] == "result":
                    self.rates = event["result"]
                elif event["event"] in ("error", "failure"):
                    reasons.append(failure_text(event))
        text = table(["rate", "measured"], [[name, f"{rate:.4g}"] for name, rate in self.rates.items()])
        print(text if self.rates else f"  not measured: {reasons}", flush=True)
        self.write("Rates", RATES_TEXT + text if self.rates else f"Not measured: {'; '.join(reasons) or 'no time'}.\n")

    def operator(self, name: str, share: float) -> None:
        module = importlib.import_module(f"gpu_{name}")
        jobs = module.jobs(self.options.quick)
        rows = self.document.rows[name] = []
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
        parts = []
        if open_jobs:
            parts.append(f"Not measured: {'; '.join(open_jobs)}.\n")
        if troubles:
            parts.append(table(["what went wrong"], [[trouble] for trouble in troubles]))
        self.goals = [goal for goal in self.goals if goal.operator != name] + module.goals(rows)
        self.document.sections["Goals"] = goals_table(self.goals)
        self.write(name, "\n".join([*parts, module.tables(rows)]))


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


def slug(device: str) -> str:
    """The device's name as a part of file names.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def goals_table(goals: Iterable[Goal]) -> str:
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    return table(["goal", "measured", ""], [[goal.goal, goal.measured, verdicts[goal.met]] for goal in goals])


def code_block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


class Document:
    """Sections of Markdown by title, and rows of CSV by operator."""

    def __init__(self, directory: Path, device: str, preface: str) -> None:
        self.directory, self.device, self.preface = directory, device, preface
        self.name = slug(device)
        self.state = "Incomplete: still running."
        self.sections: dict[str, str] = {}
        self.columns: dict[str, object] = {}  # of every CSV row
        self.rows: dict[str, list[dict]] = {}
        self.files: list[Path] = []

    def write(self) -> None:
        parts = [f"# GPU report: {self.device}", self.preface, f"**{self.state}**"]
        parts += [f"## {title}\n\n{text.rstrip()}" for title, text in self.sections.items()]
        self.file(f"gpu_report_{self.name}.md", "\n\n".join(parts) + "\n")
        for operator, rows in self.rows.items():
            if rows:
                path = self._path(f"{operator}_{self.name}.csv")
                harness.write_csv(path, [{**row, **self.columns} for row in rows])

    def file(self, name: str, text: str) -> Path:
        path = self._path(name)
        harness.write_text(path, text)
        return path

    def _path(self, name: str) -> Path:
        path = self.directory / name
        if path not in self.files:
            self.files.append(path)
        return path


def suite_section(found: gpu_process.SuiteRun) -> str:
    parts = [found.verdict() + "\n"]
    if found.failures:
        parts.append(table(["failed"], [[failure] for failure in found.failures[:30]]))
    if len(found.failures) > 30:
        parts.append(f"and {len(found.failures) - 30} more\n")
    if not found.passed and not found.failures:
        parts.append(code_block("\n".join(found.log[-15:])))
    return "\n".join(parts)


def run(options) -> int:
    return Report(options).run()
