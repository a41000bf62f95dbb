"""What every benchmark shares: interleaved timing, peak memory, the machine's description, CSV and Markdown.

Absolute times on a shared machine mean nothing tomorrow, so contenders of one case take turns and a figure is quoted as
a ratio against a peer of the same run.
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import io
import itertools
import multiprocessing
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fewshot_ext

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median of all turns and the 20th and 80th percentiles."""

    p20: float
    p50: float
    p80: float
    turns: int

    def divided_by(self, calls: int) -> "Timing":
        """Of one call, where a turn made several."""
        return Timing(self.p20 / calls, self.p50 / calls, self.p80 / calls, self.turns)


def wall_clock(call: Callable[[], object], at_least: float = 0.1) -> float:
    """Milliseconds of a call that has done its work when it returns: the mean of as many as take ``at_least`` seconds.

    They follow an untimed one, unless that takes ten times as long: the first call after other contenders finds nothing
    of its own in the caches, nor always in the memory of a virtual machine, and takes up to four times as long.
    """
    begin = time.perf_counter()
    call()
    if (elapsed := time.perf_counter() - begin) >= 10 * at_least:
        return 1e3 * elapsed
    begin = time.perf_counter()
    for calls in itertools.count(1):
        call()
        if (elapsed := time.perf_counter() - begin) >= at_least:
            return 1e3 * elapsed / calls


def interleaved(
    contenders: dict[str, Callable[[], object]],
    *,
    seconds: float,
    turns: int = 7,
    measure: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Timing]:
    """Times the contenders in turns, after two untimed ones each.

    Args:
        contenders: name -> call. A call must leave nothing behind that makes the next one faster.
        seconds: spends about this much in all.
        turns: at least this many of each, however long they take.
        measure: milliseconds of a call.
    """
    if not contenders:
        return {}
    for call in contenders.values():
        measure(call)
    begin = time.perf_counter()
    for call in contenders.values():
        measure(call)
    turns = max(turns, min(2000, int(seconds / (time.perf_counter() - begin))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, call in contenders.items():
                samples[name].append(measure(call))
    finally:
        gc.enable()
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(values: list[float]) -> Timing:
    quantiles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(quantiles[1], statistics.median(values), quantiles[7], len(values))


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int | None:
    """Bytes by which resident memory rises at its highest during one call; None where the system does not tell.

    Measured in a process of its own, on the second call of ``prepare(*arguments)()`` and on a new thread: the first
    call compiles and loads, and scratch memory that a library keeps for a calling thread must count.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_memory_here, torch.get_num_threads(), prepare, *arguments).result()


def peak_memory_here(threads: int, prepare: Callable[..., Callable[[], object]], *arguments: object) -> int | None:
    torch.set_num_threads(threads)
    call = prepare(*arguments)
    call()
    rises: list[int] = []

    def measure() -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        rises.append(_status("VmHWM") - before)

    with contextlib.suppress(OSError):
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
    return rises[0] if rises else None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(*packages: str) -> dict[str, str | int]:
    """Columns that every CSV row carries: device, capability, threads, versions."""
    described: dict[str, str | int] = {
        "device": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    return {**described, **versions("torch", *packages)}


def versions(*packages: str) -> dict[str, str]:
    """Columns for Python, this package and others."""
    found = {"python": platform.python_version(), "fewshot_ext": fewshot_ext.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def parser(description: str, *, results: str, in_turns: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark takes; without ``in_turns`` that of the time for the turns is left out."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of torch threads")
    if in_turns:
        options.add_argument("--seconds", type=float, default=10.0, help="time to spend on one case, about")
    options.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS / f"{results}.csv",
        metavar="CSV",
        help=f"write all figures into this file, by default benchmarks/results/{results}.csv, and the table beside it",
    )
    return options


def report(text: str, rows: list[dict[str, object]], save: Path | None) -> None:
    """Prints the table of a benchmark, and writes it and its figures where they are to be saved."""
    if save is not None:
        write_csv(save, rows)
        write_text(save.with_suffix(".md"), text)
    print(text)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: who is stopped while writing leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """With anything in its cells."""
    lines = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def command() -> str:
    """The command line as it would be typed, for the table's caption."""
    script = Path(sys.argv[0])
    with contextlib.suppress(ValueError):
        script = script.resolve().relative_to(Path(__file__).parent.parent)
    before = ["", *sys.argv[1:]]
    arguments = [
        argument
        for previous, argument in zip(before, sys.argv[1:], strict=False)
        if argument != "--save" and (previous != "--save" or argument.startswith("--"))
    ]
    return " ".join(["python", str(script), *arguments])


def significant(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits and no exponent."""
    if value == 0:
        return "0"
    places = digits - 1 - int(torch.tensor(abs(value)).log10().floor())
    return f"{round(value, places):.{max(places, 0)}f}"
