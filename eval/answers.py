"""What models answered to the questions of a task, and how two of them compare, question by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.evaluate import ScoreError
from eval.paired import combined, difference, flips

Pair = tuple[Tensor, Tensor]
"""Values [questions] of the model and of the baseline."""
Scores = dict[str, float | int]


@dataclass(frozen=True)
class Answers:
    """One model's answers to one task, or what a group of tasks comes to."""

    metrics: dict[str, float]
    """Metric → its value, `<metric>_stderr` → the standard error; `stderr`: the first of these."""
    questions: dict[int, str] = field(default_factory=dict)
    """Question → a hash of what was asked."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric → question → value, of every metric that is their mean."""
    parts: tuple[str, ...] = ()
    """The tasks or groups of a group."""


def scores(answers: Mapping[str, Answers], baseline: Mapping[str, Answers] | None = None) -> dict[str, Scores]:
    """By task: its metrics, the number of `questions`, and with a baseline what differs.

    That is `baseline_<metric>` and `<metric>_difference`; where the metric is a mean over questions, the errors
    `<metric>_difference_stderr` and `<metric>_difference_stderr_unpaired`; where answers are right or wrong, how many
    changed: `flips`, and `flips_to_wrong`, both of the first such metric. Raises ScoreError where the two models were
    asked different questions.
    """
    result: dict[str, Scores] = {}
    for name, answered in answers.items():
        leaves = _leaves(name, answers)
        count = sum(len(answers[leaf].questions) for leaf in leaves)
        result[name] = {**answered.metrics, **({"questions": count} if count else {})}
        if baseline is not None:
            for leaf in leaves:
                _check_questions(leaf, answers[leaf].questions, baseline[leaf].questions)
            result[name] |= _compared(name, leaves, answers, baseline)
    return result


def named(metric: str, ending: str) -> str:
    """The key of something about a metric, whose own key may end in a comma and the filter of its answers."""
    base, comma, answers = metric.partition(",")
    return f"{base}{ending}{comma}{answers}"


def _compared(
    name: str, leaves: Sequence[str], answers: Mapping[str, Answers], baseline: Mapping[str, Answers]
) -> Scores:
    found: Scores = {}
    before = baseline[name].metrics
    for metric, value in answers[name].metrics.items():
        if metric not in before or metric.partition(",")[0].endswith("stderr"):
            continue
        found |= {f"baseline_{metric}": before[metric], named(metric, "_difference"): value - before[metric]}
        pairs = _pairs(metric, leaves, answers, baseline)
        if pairs and (weights := _weights(value, [model for model, _ in pairs])):
            _, paired, unpaired = combined([difference(*pair) for pair in pairs], weights)
            errors = {"_difference_stderr": paired, "_difference_stderr_unpaired": unpaired}
            found |= {named(metric, ending): error for ending, error in errors.items() if error is not None}
        if pairs and "flips" not in found and all(((side == 0) | (side == 1)).all() for pair in pairs for side in pair):
            changed = [flips(*pair) for pair in pairs]
            found["flips"] = sum(each.all for each in changed)
            found["flips_to_wrong"] = sum(each.to_wrong for each in changed)
    return found


def _leaves(name: str, answers: Mapping[str, Answers]) -> list[str]:
    """The task itself, or all tasks of a group."""
    parts = answers[name].parts
    return [leaf for part in parts for leaf in _leaves(part, answers)] if parts else [name]


def _pairs(
    metric: str, leaves: Sequence[str], answers: Mapping[str, Answers], baseline: Mapping[str, Answers]
) -> list[Pair]:
    """Of each task, in the order of its questions; none where the metric is no mean over the same questions."""
    pairs = []
    for leaf in leaves:
        model, before = (side[leaf].values.get(metric, {}) for side in (answers, baseline))
        if not model or model.keys() != before.keys():
            return []
        order = sorted(model)
        pairs.append((_column(model, order), _column(before, order)))
    return pairs


def _column(values: Mapping[int, float], order: Sequence[int]) -> Tensor:
    return torch.tensor([values[question] for question in order], dtype=torch.float64)


def _weights(value: float, parts: Sequence[Tensor]) -> list[float] | None:
    """What each part counts for in a value that is their mean, by size or all alike; None where it is neither."""
    total = sum(map(len, parts))
    means = [part.mean().item() for part in parts]
    for weights in ([len(part) / total for part in parts], [1 / len(parts)] * len(parts)):
        mean = sum(weight * each for weight, each in zip(weights, means, strict=True))
        if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
            return weights
    return None


def _check_questions(name: str, asked: Mapping[int, str], before: Mapping[int, str]) -> None:
    if asked == before:
        return
    different = sorted(number for number in asked.keys() | before.keys() if asked.get(number) != before.get(number))
    raise ScoreError(
        f"{name}: the model was asked {len(asked)} questions and the baseline {len(before)}, of which question "
        f"{different[0]} and {len(different) - 1} others are not the same, so answers cannot be paired. "
        "Use a task that draws no questions at random"
    )
