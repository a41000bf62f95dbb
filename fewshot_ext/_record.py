"""The record of a run: versions of packages, and the comparison of its settings with another run's."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewshot_ext._version import __version__


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python, and of installed ``packages``."""
    return {
        "fewshot_ext": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def check_same_settings(before: dict[str, Any], after: dict[str, Any], folder: Path) -> None:
    """Holds the settings of the run in ``folder`` against those of a run that is to go on from it.

    Raises:
        ValueError: they differ; the message names the first setting that does, and both values.
    """
    old, new = _flatten(before), _flatten(after)
    for key in sorted(old | new):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"cannot resume {folder}: its {key} is {old.get(key)}, not {new.get(key)}; "
                "take the same settings or another output"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
