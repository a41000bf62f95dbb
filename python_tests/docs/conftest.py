"""The tools of the pages are no part of a source distribution, and neither are their tests there."""

from pathlib import Path

collect_ignore_glob = [] if (Path(__file__).parents[2] / "docs").exists() else ["test_*.py"]
