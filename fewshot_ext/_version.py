"""Single source of the version: the build reads it as text, the package re-exports it."""

__version__ = "0.1.0"
