"""From what a comparison found to the rows of an operator's CSV, and from these to its tables and goals."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import harness
from gpu_comparison import Outcome
from gpu_document import table

HEADER = [
    "contender",
    "graph, us",
    "p20 - p80",
    "times the floor",
    "stream, us",
    "p20 - p80",
    "memory, MiB",
    "error",
    "",
]
KINDS_TEXT = (
    '"graph": in a CUDA graph, the device\'s time alone; "stream": plain calls from idle to idle, the host included.'
)


def of_outcomes(
    outcomes: Sequence[Outcome], ours: str, common: Mapping[str, object], floors: Mapping[str, float]
) -> list[dict]:
    """One row for each contender and kind of timing, and one without times for a contender that was not timed.

    Args:
        ours: the contender that the others are compared with.
        common: columns of the case.
        floors: milliseconds, ``floor_ms`` among them.
    """
    reference = next(outcome.timings for outcome in outcomes if outcome.name == ours)
    return [{**common, **row} for outcome in outcomes for row in _of_outcome(outcome, floors, reference)]


def _of_outcome(outcome: Outcome, floors: Mapping[str, float], ours: Mapping[str, harness.Timing]) -> Iterator[dict]:
    for kind in outcome.timings or [""]:
        timing = outcome.timings.get(kind)
        times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "turns", "times_floor", "times_fewshot_ext"), "")
        if timing is not None:
            times.update({f"{name}_ms": f"{getattr(timing, name):.5f}" for name in ("p20", "p50", "p80")})
            times["turns"] = timing.turns
            if floors["floor_ms"]:
                times["times_floor"] = f"{timing.p50 / floors['floor_ms']:.3f}"
            times["times_fewshot_ext"] = f"{timing.p50 / ours[kind].p50:.3f}" if kind in ours else ""
        yield {
            "contender": outcome.name,
            "variant": outcome.contender.variant,
            "timing": kind,
            **times,
            **{name: f"{value:.5f}" for name, value in floors.items()},
            "extra_memory_mib": "" if outcome.memory is None else f"{outcome.memory / 2**20:.1f}",
            "relative_error": "" if outcome.error is None else f"{outcome.error:.1e}",
            "note": "; ".join(outcome.notes),
        }


def by_case(rows: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def case_table(rows: Sequence[dict], caption: str) -> str:
    """A line for each contender of a case, the kinds of timing side by side."""
    by_contender: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_contender.setdefault(row["contender"], {})[row["timing"]] = row
    lines = []
    for contender, kinds in by_contender.items():
        anyhow, graph, stream = next(iter(kinds.values())), kinds.get("graph", {}), kinds.get("stream", {})
        lines.append(
            [
                contender,
                microseconds(graph, "p50_ms"),
                spread(graph),
                graph.get("times_floor", ""),
                microseconds(stream, "p50_ms"),
                spread(stream),
                anyhow["extra_memory_mib"],
                anyhow["relative_error"],
                anyhow["note"],
            ]
        )
    return f"### {rows[0]['case']}\n\n{caption}\n\n{table(HEADER, lines)}"


def microseconds(row: Mapping[str, str], column: str) -> str:
    return harness.significant(1e3 * float(row[column])) if row.get(column) else ""


def spread(row: Mapping[str, str]) -> str:
    return f"{microseconds(row, 'p20_ms')} - {microseconds(row, 'p80_ms')}" if row.get("p20_ms") else ""


class Numbers:
    """Looks up what rows say of a case, a contender and a kind of timing; None where it was not measured."""

    def __init__(self, rows: Iterable[dict]) -> None:
        self._rows = {(row["case"], row["contender"], row["timing"]): row for row in rows}

    def __call__(self, case: str, contender: str, timing: str, column: str) -> float | None:
        text = self._rows.get((case, contender, timing), {}).get(column)
        return float(text) if text else None
