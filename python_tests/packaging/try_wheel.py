"""Tries a wheel with other Pythons and torches, each pair in a new environment, and writes what ran into a table.

    python python_tests/packaging/try_wheel.py dist/*.whl --python python3.10 python3.12 --torch torch==2.11.0 torch

An environment takes up to 7 GB where torch brings CUDA. They are made one after another in the folder for temporary
files and deleted at once. The tests run from a copy of their folder, beside which there is no checkout to import.

In each environment: one forward and backward (smoke.py); the kernels of the CUDA library, which a torch with CUDA loads
with and without a GPU (check_cuda.py); the operators' tests, without those of the emulator, which use nothing of the
wheel. With --page the rows go into that page's table in place of earlier ones of the same pair; the others stay.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
START = "<!-- environments: written by python_tests/packaging/try_wheel.py, edits are lost -->"
END = "<!-- end of environments -->"
HEADER = ("Python", "torch", "CUDA library", "Forward and backward", "Tests of the operators", "Date")
NOT_TRIED = "not tried"
VERSIONS = "import torch; print(torch.__version__, torch.version.cuda)"
TIME_LIMIT = 3600  # seconds, for each command


class Failure(Exception):
    """A command that failed, by its last line."""


def run(*command, **settings):
    """The command's output; raises Failure where it does not end well."""
    print("$", *command, flush=True)
    # Otherwise what Python has said would come after its last words on standard error.
    settings.setdefault("env", os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        done = subprocess.run(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIME_LIMIT, **settings
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"not done after {TIME_LIMIT} s") from None
    print(*done.stdout.splitlines()[-15:], sep="\n", flush=True)
    if done.returncode:
        raise Failure((done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1].strip())
    return done.stdout


def outcome(step):
    """What the step says of itself, or that it failed, and how."""
    try:
        return step()
    except Failure as failure:
        return f"**failed**: {failure}"


def try_pair(wheel, interpreter, requirement, folder):
    """One row of the table."""
    date = datetime.date.today().isoformat()
    if shutil.which(interpreter) is None:
        return (Path(interpreter).name.removeprefix("python"), "", *[NOT_TRIED] * 3, date)
    python = folder / "venv" / "bin" / "python"
    version, torch = run(interpreter, "--version").split()[-1], requirement.removeprefix("torch==")
    try:
        run(interpreter, "-m", "venv", folder / "venv")
        run(python, "-m", "pip", "install", "--quiet", *requirement.split(), f"{wheel}[test]")
        torch, cuda = run(python, "-I", "-c", VERSIONS, cwd=folder).split()[-2:]
    except Failure as failure:
        return (version, torch, f"**failed**: {failure}", "", "", date)
    for tests in ("python_tests", "benchmarks"):
        shutil.copytree(CHECKOUT / tests, folder / tests, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    packaging = folder / "python_tests" / "packaging"

    def check_cuda():
        kernels = run(python, "-I", packaging / "check_cuda.py", cwd=folder).count("CUDA kernel\n")
        return f"loaded, {kernels} kernels"

    def smoke():
        run(python, "-I", packaging / "smoke.py", cwd=folder)
        return "agree with the formula"

    def tests():
        # Compiled code of another environment must not be found in a shared cache.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        pytest = (folder / "venv" / "bin" / "pytest", "--quiet", "-k", "not simt", "python_tests/ops")
        summary = re.search(
            r"^(?:=+ )?(\d.* in [\d.]+s.*?)(?: =+)?$", run(*pytest, cwd=folder, env=environment), re.MULTILINE
        )
        return re.sub(r", \d+ (deselected|warnings?)| in [\d.]+s.*", "", summary.group(1))

    no_cuda = "not loaded: torch without CUDA"
    return (version, torch, no_cuda if cuda == "None" else outcome(check_cuda), outcome(smoke), outcome(tests), date)


def table(rows):
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(page):
    between = page.partition(START)[2].partition(END)[0]
    return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in between.strip().splitlines()[2:]]


def pair(row):
    """Minor version of Python and the whole one of torch, without its label: what a later row replaces."""
    return [int(number) for number in re.findall(r"\d+", row[0])[:2]], row[1].partition("+")[0]


def with_row(page, row):
    """The page with the row in its table."""
    if START not in page or END not in page:
        raise SystemExit(f"try_wheel: the page has no place for a table: {START} and {END}")
    others = [
        other
        for other in rows_of(page)
        if pair(other) != pair(row) and not (pair(other)[0] == pair(row)[0] and NOT_TRIED in other)
    ]
    before, after = page.partition(START)[0], page.partition(END)[2]
    return f"{before}{START}\n\n{table(sorted([*others, row], key=pair))}\n{END}{after}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="the wheel to try")
    parser.add_argument("--python", nargs="+", required=True, metavar="COMMAND", help="interpreters, as python3.12")
    parser.add_argument("--torch", nargs="+", required=True, metavar="REQUIREMENT", help="for pip, as torch==2.11.0")
    parser.add_argument("--page", type=Path, help="page with a table of environments that gets the rows")
    options = parser.parse_args(arguments)
    rows = []
    for interpreter in options.python:
        for requirement in options.torch:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(try_pair(options.wheel.resolve(), interpreter, requirement, Path(folder)))
            if options.page:
                options.page.write_text(with_row(options.page.read_text(), rows[-1]))
    print(table(rows), end="")
    raise SystemExit("failed" in str(rows))


if __name__ == "__main__":
    main()
