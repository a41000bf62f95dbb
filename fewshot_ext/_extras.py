"""Optional dependencies: one error, with the line that mends it, for everything outside torch and numpy."""

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether ``module`` could be imported, without importing it (for a dotted name its parents are imported)."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        # find_spec("a.b") raises where "a" is absent or is no package, and ValueError where a stub has no __spec__.
        return False


def require(extra: str, *modules: str) -> None:
    """Raise :class:`ImportError` unless every module of an optional feature is installed.

    Args:
        extra: the extra of this package that brings the modules (``"train"``, ``"test"``, ``"bench"``, ``"dev"``).
        modules: import names, as in ``require("train", "lightning", "sklearn")``.

    Raises:
        ImportError: names every missing module and the ``pip install`` line that brings them.
    """
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        names = ", ".join(f"'{module}'" for module in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"fewshot_ext: {names} {verb} missing; pip install 'fewshot_ext[{extra}]'",
            name=missing[0].partition(".")[0],
        )
