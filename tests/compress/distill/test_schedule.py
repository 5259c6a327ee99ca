"""Schedules: every window in turn, a rate that rises and falls, chances that are the same when asked again."""

from __future__ import annotations

import pytest
import torch

from compress.distill.schedule import batch_of, chance, cut_of, relative_rate


@pytest.mark.parametrize(("batch", "count"), [(3, 7), (8, 8), (20, 6), (1, 1)])
def test_every_window_comes_once_in_each_epoch(batch: int, count: int) -> None:
    dealt = torch.cat([batch_of(step, batch, count, seed=5) for step in range(3 * count)])
    epochs = dealt.view(-1, count)
    assert (epochs.sort(dim=1).values == torch.arange(count)).all()
    assert count == 1 or len(epochs.unique(dim=0)) > 1
    assert torch.equal(dealt, batch_of(0, len(dealt), count, seed=5))


def test_another_seed_deals_in_another_order() -> None:
    assert not torch.equal(batch_of(0, 50, 50, seed=0), batch_of(0, 50, 50, seed=1))


def test_the_rate_rises_evenly_and_falls_by_half_a_cosine() -> None:
    rates = [relative_rate(step, 12, warmup=1 / 3, floor=0.1) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx((1 + 0.1) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert relative_rate(12, 12, warmup=1 / 3, floor=0.1) == pytest.approx(0.1)
    assert relative_rate(0, 1, warmup=0.0, floor=0.1) == 1


def test_students_write_in_so_many_steps_and_from_anywhere_behind_the_first_token() -> None:
    cuts = [cut_of(step, 5, 0.5, seed=0) for step in range(1000)]
    written = [cut for cut in cuts if cut is not None]
    assert abs(len(written) - 500) < 4 * (1000 * 0.25) ** 0.5
    assert set(written) == {1, 2, 3, 4}
    assert cut_of(3, 5, 0.0, seed=0) is None


def test_chance_depends_on_what_it_is_asked_for_and_on_nothing_else() -> None:
    one, same, other = (torch.rand(3, generator=chance(*of)) for of in (("a", 1, 2), ("a", 1, 2), ("a", 12)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
