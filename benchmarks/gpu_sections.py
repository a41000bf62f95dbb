"""The GPU report from its first section to its last: order, shares of the time, and what happens when it is stopped."""

import importlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gpu_tests
import harness
from gpu_document import Document, Goal, code_block, goals_table, table
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
        with closing(self.events("gpu_machine", ["facts", "packages"], MACHINE_SECONDS)) as events:
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
        found = gpu_tests.SuiteRun()
        command = gpu_tests.pytest_command(gpu_tests.SELECTED[self.options.device])
        try:
            gpu_tests.run(found, command, self.budget.deadline(share))
        finally:
            print(f"  {found.verdict()}", flush=True)
            if not found.passed:
                (self.cut if found.out_of_time else self.failed).append(f"tests ({found.verdict()})")
                self.document.file(f"gpu_report_{self.document.name}_tests.log", "\n".join(found.log) + "\n")
            self.write("Tests", gpu_tests.suite_section(found))

    def sanitizer(self) -> None:
        sanitizer = gpu_tests.find_sanitizer()
        if sanitizer is None:
            self.failed.append(
                "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin nor in /usr/local/cuda/bin"
            )
            self.write("compute-sanitizer", self.failed[-1] + "\n")
            return
        results = []
        for index, tool in enumerate(gpu_tests.TOOLS):
            self.case = tool
            found = gpu_tests.SuiteRun()
            share = self.budget.remaining() / (len(gpu_tests.TOOLS) - index)
            try:
                gpu_tests.run(
                    found,
                    gpu_tests.sanitizer_command(sanitizer, tool),
                    self.budget.deadline(share),
                    **gpu_tests.SANITIZER_ENVIRONMENT,
                )
            finally:
                clean, summary = gpu_tests.sanitizer_verdict(found)
                results.append([tool, "clean" if clean else "**not clean**", summary, found.verdict()])
                print(f"  {tool}: {summary}; {found.verdict()}", flush=True)
                if not clean:
                    self.failed.append(f"{tool}: {summary}")
                self.document.file(f"gpu_report_{self.document.name}_{tool}.log", "\n".join(found.log) + "\n")
                self.write("compute-sanitizer", table(["tool", "", "summary", "tests"], results))

    def measure_rates(self) -> None:
        reasons = []
        with closing(self.events("gpu_machine", ["rates"], RATES_SECONDS)) as events:
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


def run(options) -> int:
    return Report(options).run()
