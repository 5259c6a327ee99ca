"""Metrics of tasks, told from what belongs to them by their keys alone."""

from __future__ import annotations

from compress.scoring.tasks import Metric, metrics_of


def test_a_metric_comes_with_what_is_known_of_its_difference() -> None:
    scores = {
        "acc": 0.71, "acc_stderr": 0.031, "acc_norm": 0.69, "acc_norm_stderr": 0.032, "stderr": 0.031, "questions": 200,
        "baseline_acc": 0.75, "acc_difference": -0.04, "acc_difference_stderr": 0.01,
        "acc_difference_stderr_unpaired": 0.044, "flips": 12, "flips_to_wrong": 10,
    }  # fmt: skip
    assert metrics_of(scores) == [
        Metric("acc", 0.71, 0.031, 0.75, -0.04, 0.01, 0.044),
        Metric("acc_norm", 0.69, 0.032),
    ]


def test_a_filter_behind_the_metric_stays_with_it() -> None:
    scores = {
        "exact_match,strict": 0.4, "exact_match_stderr,strict": 0.05, "exact_match,flexible": 0.5,
        "baseline_exact_match,strict": 0.5, "exact_match_difference,strict": -0.1,
        "exact_match_difference_stderr,strict": 0.02,
    }  # fmt: skip
    assert metrics_of(scores) == [
        Metric("exact_match,strict", 0.4, 0.05, 0.5, -0.1, 0.02),
        Metric("exact_match,flexible", 0.5),
    ]


def test_the_error_of_a_task_is_that_of_its_first_metric() -> None:
    assert metrics_of({"acc": 0.7, "f1": 0.6, "stderr": 0.01}) == [Metric("acc", 0.7, 0.01), Metric("f1", 0.6)]
