"""Benchmarks, run as ``python benchmarks/bench_NAME.py``, and stress tests: ``python -m benchmarks.stress_NAME``."""

import sys

# "python -m" puts the checkout first, where fewshot_ext may have no compiled library: an installed package goes before.
sys.path.append(sys.path.pop(0))
