"""Optional dependencies: one error, with the line that mends it, for everything outside torch and numpy."""

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found; it is not imported (only the parents of a dotted name are)."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        # find_spec("a.b") raises the first where "a" is absent, the second where a loaded module has no
        # __spec__.
        return False


def require(extra: str, *modules: str) -> None:
    """Raise :class:`ImportError` unless every module of an optional feature is installed.

    Args:
        extra: the extra of this package that brings them (``"train"``, ``"test"``, ``"bench"``, ``"dev"``).
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
