"""Differences of paired answers against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.paired import Difference, combined, difference, flips, standard_error


def answers(share: float, count: int, seed: int) -> Tensor:
    """Right, with this probability, or wrong."""
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share).double()


def both(neither: int, gained: int, lost: int, alike: int) -> tuple[Tensor, Tensor]:
    """Answers of model and baseline: wrong in both, right in the model alone, in the baseline alone, and in both."""
    model = [0] * neither + [1] * gained + [0] * lost + [1] * alike
    baseline = [0] * neither + [0] * gained + [1] * lost + [1] * alike
    return torch.tensor(model).double(), torch.tensor(baseline).double()


def test_the_standard_error_of_right_and_wrong_is_the_binomial_one() -> None:
    values = torch.tensor([1.0] * 30 + [0.0] * 70)
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_one_question_has_no_standard_error() -> None:
    one = torch.ones(1)
    assert standard_error(one) is None
    assert difference(one, 0 * one) == Difference(1, None, None)


def test_a_model_differs_from_itself_by_nothing_and_that_is_certain() -> None:
    same = answers(0.7, 100, seed=0)
    found = difference(same, same)
    assert (found.mean, found.error) == (0, 0)
    assert found.unpaired == pytest.approx(math.sqrt(2) * (standard_error(same) or 0))


def test_a_constant_shift_of_every_answer_is_certain() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    found = difference(values + 0.25, values)
    assert found.mean == pytest.approx(0.25)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_of_independent_answers_pairing_gains_nothing() -> None:
    found = difference(answers(0.6, 100_000, seed=1), answers(0.7, 100_000, seed=2))
    assert found.error == pytest.approx(found.unpaired, rel=0.01)


def test_of_opposite_answers_pairing_shows_that_more_is_unknown() -> None:
    values = answers(0.5, 1000, seed=3)
    found = difference(values, 1 - values)
    assert found.error == pytest.approx(math.sqrt(2) * (found.unpaired or 0))


def test_the_error_is_the_spread_of_the_difference_over_draws_of_questions() -> None:
    """Questions of all kinds of difficulty, whose answers one model in twenty changes."""
    generator = torch.Generator().manual_seed(4)
    draws, count = 2000, 200
    baseline = (torch.rand(draws, count, generator=generator) < torch.rand(draws, count, generator=generator)).double()
    changed = torch.rand(draws, count, generator=generator) < 0.05
    model = torch.where(changed, 1 - baseline, baseline)
    found = [difference(*pair) for pair in zip(model, baseline, strict=True)]
    spread = torch.tensor([each.mean for each in found]).std().item()
    claimed = torch.tensor([each.error or 0 for each in found]).mean().item()
    assert claimed == pytest.approx(spread, rel=0.06)
    assert spread < 0.5 * torch.tensor([each.unpaired or 0 for each in found]).mean().item()


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (7, 0), (0, 7), (12, 5), (40, 60)])
def test_flips_say_all_there_is_to_know_about_a_difference(gained: int, lost: int) -> None:
    model, baseline = both(50, gained, lost, 130)
    count = len(model)
    assert flips(model, baseline) == (gained + lost, lost)
    found = difference(model, baseline)
    assert found.mean == pytest.approx((gained - lost) / count)
    squared = ((gained + lost) / count - found.mean**2) / (count - 1)
    assert found.error == pytest.approx(math.sqrt(squared))


def test_where_nothing_is_gained_on_the_whole_the_error_is_mcnemars() -> None:
    model, baseline = both(50, 10, 10, 130)
    count = len(model)
    assert difference(model, baseline).error == pytest.approx(math.sqrt(20) / count * math.sqrt(count / (count - 1)))


def test_a_score_can_stand_still_while_answers_flip() -> None:
    model, baseline = both(0, 25, 25, 50)
    assert difference(model, baseline).mean == 0
    assert flips(model, baseline) == (50, 25)


def test_questions_in_the_same_order_give_the_same_in_any_order() -> None:
    model, baseline = both(5, 6, 7, 8)
    order = torch.randperm(len(model), generator=torch.Generator().manual_seed(5))
    assert difference(model[order], baseline[order]) == pytest.approx(difference(model, baseline))


def test_parts_weighed_by_size_are_the_whole() -> None:
    parts: list[tuple[Tensor, Tensor]] = [both(5, 6, 2, 8), both(20, 1, 3, 50), both(0, 2, 1, 3)]
    sizes = [len(model) for model, _ in parts]
    weights = [size / sum(sizes) for size in sizes]
    found = combined([difference(*part) for part in parts], weights)
    whole = difference(*(torch.cat(side) for side in zip(*parts, strict=True)))
    assert found.mean == pytest.approx(whole.mean)
    assert found.error == pytest.approx(whole.error, rel=0.05)


def test_the_error_of_a_plain_mean_of_tasks_falls_with_the_root_of_their_number() -> None:
    one: Any = Difference(0.1, 0.02, 0.03)
    assert combined([one] * 4, [0.25] * 4) == pytest.approx((0.1, 0.01, 0.015))


def test_a_part_without_an_error_leaves_the_whole_without_one() -> None:
    assert combined([Difference(0.1, 0.02, 0.03), Difference(0.3, None, None)], [0.5, 0.5]) == (0.2, None, None)
