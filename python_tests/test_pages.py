"""The pages: every python block runs, every link leads somewhere, every test that is named exists.

A block whose first line is ``# needs fewshot_ext[EXTRA]`` may use what those extras bring; every other block runs on
torch and numpy alone. One whose first line names torchrun is run by ``parallel/test_training.py``.
"""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/*.md", "python_tests/*/*.md")
PAGES = sorted({page for pattern in PATTERNS for page in ROOT.glob(pattern)})
NEEDS = re.compile(r"# needs fewshot_ext\[([\w, -]+)\]")

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the pages are not part of a source distribution")


def blocks():
    """The python blocks of all pages, each with its page and line for a name."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if "torchrun" in block[1].partition("\n")[0]:
                continue
            line = text.count("\n", 0, block.start()) + 1
            found.append(pytest.param(block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def modules_of_extras(kept):
    """Import names that only extras other than ``kept`` bring."""

    def name_of(requirement):
        return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")

    def requirements(distribution):
        try:
            return metadata.requires(distribution) or ()
        except metadata.PackageNotFoundError:
            return ()

    needed, waiting, extra = set(), ["torch", "numpy"], set()
    for requirement in requirements("fewshot_ext"):
        of = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if of and of[1] in kept:
            waiting.append(name_of(requirement))
        elif of:
            extra.add(name_of(requirement))
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [name_of(other) for other in requirements(name) if "extra ==" not in other]
    return sorted(
        module
        for module, distributions in metadata.packages_distributions().items()
        if {name_of(distribution) for distribution in distributions} <= extra - needed
    )


def run_without(modules, script, folder):
    """Runs ``script`` in an empty folder, in a process that finds none of ``modules``."""
    (folder / "snippet.py").write_text(script)
    start = f"""
import runpy, sys
from importlib.machinery import PathFinder
class WithoutExtras:
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {modules!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
runpy.run_path("snippet.py", run_name="__main__")
"""
    # Threads that wait for each other are slow where tests share the cores.
    return subprocess.run(
        [sys.executable, "-I", "-c", start],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", blocks())
def test_python_blocks_run(script, request, tmp_path):
    first = script.partition("\n")[0]
    extras = [extra.strip() for extra in NEEDS.match(first)[1].split(",")] if NEEDS.match(first) else []
    done = run_without(modules_of_extras(extras), script, tmp_path)
    snippet = request.node.callspec.id
    assert done.returncode == 0, f"the python block at {snippet} fails:\n{done.stderr}"
    if extras:
        without = run_without(modules_of_extras(()), script, tmp_path).stderr
        assert re.search(rf"pip install 'fewshot_ext\[({'|'.join(extras)})\]'", without), (
            f"the python block at {snippet} does not say which extra is missing, or needs none:\n{without}"
        )


def test_a_block_that_fails_names_itself_and_its_page(tmp_path):
    failing = run_without([], "raise SystemExit('no')", tmp_path)
    assert failing.returncode == 1 and failing.stderr.strip() == "no"
    assert {"README.md", "docs/deepemd.md"} <= {block.id.partition(":")[0] for block in blocks()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        link, _, anchor = "".join(target).partition("#")
        if link.startswith(("http://", "https://")):
            continue
        linked = (page.parent / link) if link else page
        assert linked.exists(), f"{page.relative_to(ROOT)} links {link}, which does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.relative_to(ROOT)} links #{anchor}, and {linked.name} has no such title"


def test_tests_that_pages_name_exist():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "python_tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in sources, f"{page.relative_to(ROOT)} names {name}, which does not exist"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
