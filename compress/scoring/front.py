"""Which of several checkpoints are worth their bytes: those that no other beats in both size and quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.scoring.tasks import metrics_of

LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier", "loss", "mse")
"""Parts of the names of metrics that a good model makes small."""


@dataclass(frozen=True)
class Measure:
    """One thing that checkpoints were measured by."""

    of: str
    """The text, or the task."""
    name: str
    rising: bool = False
    """Whether more is better."""
    values: dict[str, float] = field(default_factory=dict)
    """By model."""
    errors: dict[str, float] = field(default_factory=dict)
    """Their standard errors, where these are known."""

    def front(self, sizes: Mapping[str, int]) -> list[str]:
        """The models that no other beats in size and in this, from the smallest on."""
        sign = -1 if self.rising else 1
        return pareto({model: (sizes[model], sign * value) for model, value in self.values.items()})

    def note(self, model: str, value: float | None, error: float | None) -> None:
        if value is not None:
            self.values[model] = value
        if error is not None:
            self.errors[model] = error


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other is as good as in both numbers and better than in one; less is better.

    From the least first number on. Points that coincide stand or fall together.
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1] or points[name] == points[front[-1]]:
            front.append(name)
    return front


def measures(result: Mapping[str, Any]) -> list[Measure]:
    """What a comparison was made by: each text, then each metric of each task.

    A text counts by its divergence from the baseline, or by perplexity where there is none.
    """
    found: dict[tuple[str, str], Measure] = {}

    def measure(of: str, name: str, rising: bool = False) -> Measure:
        return found.setdefault((of, name), Measure(of, name, rising))

    for row in result["models"]:
        for text in row["texts"]:
            if result["baseline"]:
                values = text.get("kl_divergence"), text.get("kl_standard_error")
                measure(text["name"], "KL divergence").note(row["model"], *values)
            else:
                measure(text["name"], "perplexity").note(row["model"], text.get("perplexity"), None)
    for row in result["models"]:
        for task, scores in row["tasks"].items():
            for metric in metrics_of(scores):
                rising = not any(part in metric.name for part in LOWER_IS_BETTER)
                measure(task, metric.name, rising).note(row["model"], metric.value, metric.error)
    return list(found.values())
