"""Benchmarks are scripts beside each other and no package: their folder is where a script's imports look first."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
