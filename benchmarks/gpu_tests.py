"""The CUDA half of the test suite in a process of its own, by itself or under compute-sanitizer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpu_document import code_block, table
from gpu_process import Child, Overdue, Silent

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "python_tests" / "ops"  # what runs kernels; the rest wants packages that a GPU machine may not have
SELECTED = {"cuda": "cuda", "cpu": "cpu-baseline and empty_input"}  # backends name their tests
# Each path of the operators once, on the smallest problems there are: under a sanitizer everything takes long.
SANITIZED = (
    "cuda and (empty_input or each_gradient_by_itself or value_does_not_depend_on_gradients or inputs_are_not_modified)"
)
PATIENCE = 150.0  # seconds for one test, of which those that compile take longest
GRACE = 10.0  # seconds for pytest to say what failed before it is killed

OUTCOME = re.compile(r"(?P<test>\S*::.*) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$")
SELECTION = re.compile(r"collected (\d+) items?(?:.* (\d+) selected)?")
FAILURE = re.compile(r"(?:FAILED|ERROR) (\S+\.py\b.*)")
SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (.*)")
CLEAN = re.compile(r"0 (?:errors|hazards displayed \(0 errors, 0 warnings\))$")

# Error reports of the API calls that torch makes say nothing of the kernels; what the kernels' own calls return is
# checked where they are made. Writes by kernels that are filtered out would look like no writes to initcheck.
OURS_ALONE = ["--kernel-name", "kernel_substring=fewshot_ext"]
TOOLS = {
    "memcheck": [*OURS_ALONE, "--report-api-errors", "no"],
    "racecheck": OURS_ALONE,
    "synccheck": OURS_ALONE,
    "initcheck": [],
}
# Torch's caching allocator would hand out parts of one allocation, and hide what is read or written beyond them.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER_FAILED = 86  # the exit code to tell errors that it found from tests that failed


@dataclass
class SuiteRun:
    counts: Counter = field(default_factory=Counter)
    selected: int = 0
    failures: list[str] = field(default_factory=list)
    cut: str = ""  # why it did not come to its end
    out_of_time: bool = False  # and that is all that is known against it
    returncode: int | None = None
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    @property
    def ran(self) -> int:
        return sum(self.counts.values())

    @property
    def passed(self) -> bool:
        return self.returncode == 0 and not self.cut

    def verdict(self) -> str:
        counts = ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(self.counts.items()))
        text = f"{self.ran} of {self.selected} selected tests ran in {self.seconds:.0f} s: {counts or 'none'}"
        if self.cut:
            return f"{text}; cut: {self.cut}"
        return text if self.passed else f"{text}; pytest's exit code {self.returncode}"

    def read(self, line: str) -> None:
        self.log.append(line)
        if match := OUTCOME.match(line):
            self.counts[match["outcome"]] += 1
        elif match := FAILURE.match(line):
            self.failures.append(match[1])
        elif match := SELECTION.search(line):
            self.selected = int(match[2] or match[1])


def pytest_command(selected: str) -> list[str]:
    options = ["-v", "--color=no", "--tb=short", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", str(TESTS), "-k", selected, *options, "-o", "faulthandler_timeout=60"]


def environment(**more: str) -> dict[str, str]:
    """Of children: a relative PYTHONPATH keeps its meaning, and the checkout does not get in front of the package."""
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    return {**os.environ, **own, **more}


def run(found: SuiteRun, command: list[str], deadline: float, **variables: str) -> None:
    """Fills ``found`` as the tests go on, so that it holds what there is whoever stops this."""
    begin = time.monotonic()
    deadline -= GRACE
    # Standard error too: it has what a crash leaves behind.
    with Child(command, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(**variables)) as child:
        child.patience = PATIENCE
        found.cut = "stopped"
        try:
            for line in child.lines(deadline):
                found.read(line)
                found.seconds = time.monotonic() - begin
                _show(found, line)
            found.cut = ""
        except (Overdue, Silent) as stop:
            test = child.unfinished_line.decode(errors="replace").strip()
            found.out_of_time = isinstance(stop, Overdue)
            why = "out of time" if found.out_of_time else f"no sign of life for {PATIENCE:g} s"
            found.cut = f"{why} in {test}" if "::" in test else why
            for line in _last_words(child):
                found.read(line)
            found.out_of_time &= not (found.counts["FAILED"] or found.counts["ERROR"])
        found.returncode = child.process.poll()
    found.seconds = time.monotonic() - begin


def _show(found: SuiteRun, line: str) -> None:
    match = OUTCOME.match(line)
    if match and match["outcome"] in ("FAILED", "ERROR"):
        print(f"  {match['outcome']} {match['test']}", flush=True)
    elif match and found.ran % 50 == 0:
        print(f"  {found.ran} of {found.selected} tests", flush=True)


def _last_words(child: Child) -> Iterator[str]:
    child.signal(signal.SIGINT)
    child.patience = GRACE
    try:
        yield from child.lines(time.monotonic() + GRACE)
    except (Overdue, Silent):
        return


def suite_section(found: SuiteRun) -> str:
    parts = [found.verdict() + "\n"]
    if found.failures:
        parts.append(table(["failed"], [[failure] for failure in found.failures[:30]]))
    if len(found.failures) > 30:
        parts.append(f"and {len(found.failures) - 30} more\n")
    if not found.passed and not found.failures:
        parts.append(code_block("\n".join(found.log[-15:])))
    return "\n".join(parts)


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(place) / "bin") for place in places if place)])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    # Torch takes longer to import than the sanitizer would wait for the first CUDA call.
    general = ["--launch-timeout", "0", "--target-processes", "application-only", "--print-limit", "20"]
    exit_code = ["--error-exitcode", str(SANITIZER_FAILED)]
    return [sanitizer, "--tool", tool, *general, *exit_code, *TOOLS[tool], *pytest_command(SANITIZED)]


def sanitizer_verdict(found: SuiteRun) -> tuple[bool, str]:
    """Whether all was well, and the summary of the sanitizer."""
    summaries = [match[1] for line in found.log if (match := SUMMARY.match(line))]
    if not summaries:
        return False, found.cut or f"no summary, exit code {found.returncode}"
    clean = all(CLEAN.match(summary) for summary in summaries)
    return clean and found.passed and found.counts["PASSED"] > 0, "; ".join(summaries)
