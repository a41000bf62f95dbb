"""Checks that the typed configurations share, so that one mistake is worded in one way everywhere."""

import math
from numbers import Integral, Real


def check_count(name: str, value: int, least: int) -> None:
    """Raises TypeError unless ``value`` is an integer, and ValueError unless it is at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    check_at_least(name, value, least)


def check_finite(name: str, value: float) -> None:
    """Raises TypeError unless ``value`` is a number, and ValueError unless it is finite."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError unless ``value`` is finite and at least ``least``."""
    check_finite(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is finite and above zero."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless 0 <= ``value`` < 1."""
    check_finite(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
