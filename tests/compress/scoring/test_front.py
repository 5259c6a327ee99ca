"""The front: who is on it, whatever the order, and by which measure."""

from __future__ import annotations

import random
from typing import Any

import pytest

from compress.scoring.front import measures, pareto


def test_who_is_beaten_in_one_and_better_in_none_is_not_on_the_front() -> None:
    points = {
        "small": (1.0, 9.0),
        "middling": (2.0, 5.0),
        "larger": (3.0, 5.0),
        "worse": (2.0, 6.0),
        "good": (4.0, 0.0),
    }
    assert pareto(points) == ["small", "middling", "good"]


def test_points_that_coincide_stand_together() -> None:
    assert pareto({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (2.0, 1.0)}) == ["a", "b"]


@pytest.mark.parametrize("seed", range(10))
def test_the_front_is_what_the_definition_says(seed: int) -> None:
    draw = random.Random(seed)
    points = {str(name): (float(draw.randint(0, 9)), float(draw.randint(0, 9))) for name in range(30)}
    beaten = {
        name
        for name, (x, y) in points.items()
        if any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    }
    assert set(pareto(points)) == points.keys() - beaten


def result(**scores: Any) -> dict[str, Any]:
    """Of models of one byte more each, with a baseline, and these tasks."""
    rows = [
        {"model": name, "bytes": place, "texts": [], "tasks": tasks}
        for place, (name, tasks) in enumerate(scores.items())
    ]
    return {"baseline": "original", "models": rows}


@pytest.mark.parametrize(
    ("metric", "front"), [("acc", ["a", "c"]), ("exact_match,strict", ["a", "c"]), ("word_perplexity", ["a", "b"])]
)
def test_more_is_better_but_for_what_good_models_make_small(metric: str, front: list[str]) -> None:
    (found,) = measures(result(a={"t": {metric: 5.0}}, b={"t": {metric: 4.0}}, c={"t": {metric: 6.0}}))
    assert found.front({"a": 1, "b": 2, "c": 3}) == front


def test_a_text_counts_by_divergence_and_alone_by_perplexity(comparison: dict[str, Any]) -> None:
    by_divergence, *_ = measures(comparison)
    assert (by_divergence.of, by_divergence.name) == ("test.jsonl", "KL divergence")
    assert by_divergence.front({row["model"]: row["bytes"] for row in comparison["models"]}) == comparison["pareto"]
    by_perplexity, *_ = measures({**comparison, "baseline": None})
    assert (by_perplexity.name, by_perplexity.values["/models/llama"]) == ("perplexity", 54.3)


def test_who_was_not_measured_is_not_on_the_front() -> None:
    (found,) = measures(result(a={}, b={"t": {"acc": 0.5}}))
    assert found.front({"a": 0, "b": 1}) == ["b"]
