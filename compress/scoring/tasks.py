"""What a task's flat dict of scores says, a metric at a time, each beside the baseline's where there was one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNTS = ("stderr", "questions", "flips", "flips_to_wrong")
"""Keys that are of the task as a whole."""
DERIVED = ("_stderr", "_difference", "_stderr_unpaired")
"""What is written behind a metric's name, before the filter of its answers, to name what belongs to it."""


@dataclass(frozen=True)
class Metric:
    """One metric of one task; None: not measured."""

    name: str
    value: float | None
    error: float | None = None
    """Its standard error."""
    baseline: float | None = None
    difference: float | None = None
    """Over the baseline, question by question."""
    paired: float | None = None
    """The standard error of that difference, from the differences."""
    unpaired: float | None = None
    """What it would be, were the two models asked different questions."""


def metrics_of(scores: Mapping[str, Any]) -> list[Metric]:
    """The metrics of one task, in their order."""
    names = [key for key in scores if key not in COUNTS and not _is_derived(key)]
    return [_metric(name, scores, first=name == names[0]) for name in names]


def _is_derived(key: str) -> bool:
    name = key.partition(",")[0]
    return key.startswith("baseline_") or any(key.endswith(end) or name.endswith(end) for end in DERIVED)


def _metric(name: str, scores: Mapping[str, Any], *, first: bool) -> Metric:
    base, comma, answers = name.partition(",")

    def of(ending: str) -> float | None:
        found = scores.get(f"{base}{ending}{comma}{answers}", scores.get(f"{name}{ending}"))
        return found if isinstance(found, int | float) else None

    error = of("_stderr")
    return Metric(
        name,
        of(""),
        scores.get("stderr") if first and error is None else error,
        scores.get(f"baseline_{name}"),
        of("_difference"),
        of("_difference_stderr"),
        of("_difference_stderr_unpaired"),
    )
