"""Progress on a terminal: one bar for the whole run, one below it for the stage under way."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def progress_bar(**options):
    """A tqdm bar on stderr that vanishes when it is done; nothing at all where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(file=sys.stderr, disable=None, leave=False, dynamic_ncols=True, **options)


class StagedProgress:
    """A context manager around a run of ``total`` parts, each of which goes through stages of its own.

    Args:
        name: what the parts are, in the plural.
        total: how many there are.
    """

    def __init__(self, name: str, total: int) -> None:
        self._parts = progress_bar(
            total=total, desc=name, bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar for one stage; yields a function that takes the count so far and a remark."""
        bar = progress_bar(
            total=total,
            desc=name,
            position=1,
            bar_format="{desc} |{bar}| {percentage:3.0f}%, {remaining} left{postfix}",
        )

        def report(count: int, remark: str = "") -> None:
            bar.set_postfix_str(remark, refresh=False)
            bar.update(count - bar.n)

        with bar:
            yield report

    def finish(self, line: str) -> None:
        """Counts one part as done; where there is no bar, prints ``line`` instead."""
        self._parts.update()
        if self._parts.disable:
            print(line, file=sys.stderr, flush=True)
