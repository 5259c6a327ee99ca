"""What two models' answers to the same tasks are reported to differ by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from eval.answers import Answers, scores
from eval.evaluate import ScoreError
from eval.paired import difference


def answered(*values: float, metric: str = "acc", asked: str = "") -> Answers:
    mean = sum(values) / len(values)
    questions = {number: f"{asked}{number}" for number in range(len(values))}
    return Answers({metric: mean, "stderr": 0.1}, questions, {metric: dict(enumerate(values))})


def group(parts: Mapping[str, Answers], value: float) -> dict[str, Answers]:
    return {**parts, "group": Answers({"acc": value}, parts=tuple(parts))}


def expected(model: Sequence[float], baseline: Sequence[float]) -> Any:
    return difference(torch.tensor(model), torch.tensor(baseline))


def test_without_a_baseline_a_task_has_its_metrics_and_the_number_of_questions() -> None:
    assert scores({"task": answered(1, 0, 1, 1)}) == {"task": {"acc": 0.75, "stderr": 0.1, "questions": 4}}


def test_with_one_the_difference_is_taken_question_by_question() -> None:
    found = scores({"task": answered(1, 0, 1, 0, 0)}, {"task": answered(1, 1, 1, 0, 1)})["task"]
    _, paired, unpaired = expected([1, 0, 1, 0, 0], [1, 1, 1, 0, 1])
    assert found == pytest.approx(
        {
            "acc": 0.4,
            "stderr": 0.1,
            "questions": 5,
            "baseline_acc": 0.8,
            "acc_difference": -0.4,
            "acc_difference_stderr": paired,
            "acc_difference_stderr_unpaired": unpaired,
            "flips": 2,
            "flips_to_wrong": 2,
        }
    )


def test_questions_are_matched_by_number_and_not_by_place() -> None:
    model = answered(1, 0, 1, 0, 0)
    turned = Answers(model.metrics, model.questions, {"acc": dict(reversed(model.values["acc"].items()))})
    assert scores({"task": turned}, {"task": model})["task"]["flips"] == 0


def test_a_filter_stays_at_the_end_of_each_key() -> None:
    name = "exact_match,strict-match"
    found = scores({"task": answered(1, 0, metric=name)}, {"task": answered(1, 1, metric=name)})["task"]
    assert found["exact_match_difference,strict-match"] == found[name] - found[f"baseline_{name}"] == -0.5
    assert "exact_match_difference_stderr,strict-match" in found


def test_answers_that_are_not_right_or_wrong_do_not_flip() -> None:
    found = scores({"task": answered(0.5, 1)}, {"task": answered(0, 1)})["task"]
    assert found["acc_difference_stderr"] == pytest.approx(0.25)
    assert "flips" not in found


def test_a_metric_that_is_no_mean_over_questions_differs_by_an_unknown_error() -> None:
    perplexity = Answers({"word_perplexity": 20.0}, {0: "a"})
    found = scores({"task": perplexity}, {"task": Answers({"word_perplexity": 16.0}, {0: "a"})})["task"]
    assert found == {
        "word_perplexity": 20,
        "questions": 1,
        "baseline_word_perplexity": 16,
        "word_perplexity_difference": 4,
    }


def test_flips_are_of_the_first_metric_that_has_them() -> None:
    values = {"likelihood": {0: 0.3, 1: 0.9}, "acc": {0: 1.0, 1: 0.0}, "acc_norm": {0: 1.0, 1: 1.0}}
    model = Answers({"likelihood": 0.6, "acc": 0.5, "acc_norm": 1.0}, {0: "a", 1: "b"}, values)
    before = {**values, "acc": {0: 0.0, 1: 1.0}, "acc_norm": {0: 0.0, 1: 0.0}}
    baseline = Answers({"likelihood": 0.6, "acc": 0.5, "acc_norm": 0.0}, {0: "a", 1: "b"}, before)
    found = scores({"task": model}, {"task": baseline})["task"]
    assert (found["acc_difference"], found["flips"], found["flips_to_wrong"]) == (0, 2, 1)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_differs_by_the_weighted_mean_of_its_tasks(by_size: bool) -> None:
    first, second = ([1, 0, 0, 1], [1, 1, 0, 1]), ([0, 1, 1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0, 0, 1])
    weights = [4 / 12, 8 / 12] if by_size else [0.5, 0.5]

    def answers(side: int) -> dict[str, Answers]:
        parts = {"one": answered(*first[side]), "two": answered(*second[side])}
        means = [part.metrics["acc"] for part in parts.values()]
        return group(parts, sum(weight * mean for weight, mean in zip(weights, means, strict=True)))

    found = scores(answers(0), answers(1))["group"]
    one, two = expected(*first), expected(*second)
    assert found["questions"] == 12
    assert found["acc_difference"] == pytest.approx(weights[0] * one.mean + weights[1] * two.mean)
    for key, index in (("acc_difference_stderr", 1), ("acc_difference_stderr_unpaired", 2)):
        assert found[key] == pytest.approx(((weights[0] * one[index]) ** 2 + (weights[1] * two[index]) ** 2) ** 0.5)
    assert (found["flips"], found["flips_to_wrong"]) == (3, 1)


def test_a_group_of_groups_is_made_of_all_their_tasks() -> None:
    inner = group({"one": answered(1, 0), "two": answered(1, 1)}, 0.75)
    answers = {**inner, "outer": Answers({"acc": 0.75}, parts=("group",))}
    assert scores(answers, answers)["outer"]["questions"] == 4
    assert scores(answers, answers)["outer"]["flips"] == 0


def test_a_group_whose_value_is_some_other_mean_claims_no_error() -> None:
    answers = group({"one": answered(1, 0), "two": answered(1, 1, 0)}, 0.123)
    found = scores(answers, answers)["group"]
    assert found["acc_difference"] == 0
    assert "acc_difference_stderr" not in found


def test_models_that_were_asked_different_questions_are_not_compared() -> None:
    with pytest.raises(
        ScoreError, match="task: the model was asked 3 questions and the baseline 3, of which question 0"
    ):
        scores({"task": answered(1, 0, 1)}, {"task": answered(1, 0, 1, asked="other ")})
    with pytest.raises(ScoreError, match="question 2 and 0 others"):
        scores({"task": answered(1, 0, 1)}, {"task": answered(1, 0)})
