"""Six divergences against what their definitions say, term by term and slope by slope."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.distill.divergences import Divergence, divergence_of


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    return share * a + (1 - share) * b


# Kind and mixture, and the definition in terms of p and q.
DEFINITIONS: dict[tuple[str, float | None], Callable[[Tensor, Tensor], Tensor]] = {
    ("forward_kl", None): kl,
    ("reverse_kl", None): lambda p, q: kl(q, p),
    ("jsd", 0.3): lambda p, q: 0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3)),
    ("jsd", None): lambda p, q: 0.5 * kl(p, mixed(p, q, 0.5)) + 0.5 * kl(q, mixed(p, q, 0.5)),
    ("skew_forward_kl", None): lambda p, q: kl(p, mixed(p, q, 0.1)),
    ("skew_forward_kl", 0.8): lambda p, q: kl(p, mixed(p, q, 0.8)),
    ("skew_reverse_kl", None): lambda p, q: kl(q, mixed(q, p, 0.1)),
    ("skew_reverse_kl", 0.8): lambda p, q: kl(q, mixed(q, p, 0.8)),
    ("total_variation", None): lambda p, q: 0.5 * (p - q).abs().sum(-1),
}
ALL = [divergence_of(*name) for name in DEFINITIONS]


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def value(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> float:
    return float(divergence.terms(log_p, log_q).sum())


@pytest.mark.parametrize(("name", "definition"), DEFINITIONS.items(), ids=map(str, DEFINITIONS))
def test_terms_add_up_to_the_definition_and_slopes_to_its_gradient(
    name: tuple[str, float | None], definition: Callable[[Tensor, Tensor], Tensor]
) -> None:
    divergence = divergence_of(*name)
    x, z = logits(0, 50, 9), logits(1, 50, 9).requires_grad_()
    log_p, log_q = x.log_softmax(-1), z.detach().log_softmax(-1)
    wanted = definition(x.softmax(-1), z.softmax(-1))
    assert_close(divergence.terms(log_p, log_q).sum(-1), wanted.detach())
    slope = divergence.slope(log_p, log_q)
    (gradient,) = torch.autograd.grad(wanted.sum(), z)
    assert_close(slope - log_q.exp() * slope.sum(-1, keepdim=True), gradient)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("forward_kl", 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("reverse_kl", 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        ("total_variation", 0.25),
    ],
)
def test_a_coin_against_a_loaded_one_has_the_value_worked_out_by_hand(kind: str, wanted: float) -> None:
    assert value(divergence_of(kind), logs(0.5, 0.5), logs(0.25, 0.75)) == pytest.approx(wanted)


def test_the_jensen_shannon_divergence_of_what_never_coincides_is_one_bit() -> None:
    assert value(divergence_of("jsd"), logs(1, 0), logs(0, 1)) == pytest.approx(math.log(2))


def test_skewed_divergences_of_what_never_coincides_are_the_logarithm_of_the_share() -> None:
    for kind in ("skew_forward_kl", "skew_reverse_kl"):
        assert value(divergence_of(kind, 0.1), logs(1, 0), logs(0, 1)) == pytest.approx(-math.log(0.1))


@pytest.mark.parametrize(("beta", "kind"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_jsd_at_its_ends_is_exactly_the_kl(beta: int, kind: str) -> None:
    log_p, log_q = logits(0, 5, 9).log_softmax(-1), logits(1, 5, 9).log_softmax(-1)
    end, plain = divergence_of("jsd", beta), divergence_of(kind)
    assert torch.equal(end.terms(log_p, log_q), plain.terms(log_p, log_q))
    assert torch.equal(end.slope(log_p, log_q), plain.slope(log_p, log_q))
    near = 1e-6 if beta == 0 else 1 - 1e-6
    assert value(divergence_of("jsd", near), log_p, log_q) / 1e-6 == pytest.approx(value(plain, log_p, log_q), rel=1e-4)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_a_distribution_does_not_differ_from_itself_and_does_from_every_other(divergence: Divergence) -> None:
    log_p, log_q = logits(0, 50, 9).log_softmax(-1), logits(1, 50, 9).log_softmax(-1)
    assert divergence.terms(log_p, log_p).sum(-1).abs().max() < 1e-15
    assert divergence.terms(log_p, log_q).sum(-1).min() > 1e-3
    slope = divergence.slope(log_p, log_p)
    assert (slope - log_p.exp() * slope.sum(-1, keepdim=True)).abs().max() < 1e-15


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_a_token_that_neither_can_say_changes_nothing(divergence: Divergence) -> None:
    log_p, log_q = logs(0.5, 0.5), logs(0.25, 0.75)
    padded_p, padded_q = logs(0.5, 0.5, 0), logs(0.25, 0.75, 0)
    for part in (divergence.terms, divergence.slope):
        assert torch.equal(part(padded_p, padded_q)[:, :2], part(log_p, log_q))
        assert float(part(padded_p, padded_q)[0, 2]) == 0


def test_only_the_kl_that_asks_for_a_token_is_infinite_where_it_is_missing() -> None:
    without, even = logs(1, 0), logs(0.5, 0.5)
    assert value(divergence_of("forward_kl"), without, even) == pytest.approx(math.log(2))
    assert value(divergence_of("forward_kl"), even, without) == math.inf
    assert value(divergence_of("reverse_kl"), without, even) == math.inf
    assert value(divergence_of("reverse_kl"), even, without) == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_what_it_is_given_is_left_as_it_was(divergence: Divergence) -> None:
    log_p, log_q = logits(0, 5, 9).log_softmax(-1), logits(1, 5, 9).log_softmax(-1)
    kept = log_p.clone(), log_q.clone()
    divergence.terms(log_p, log_q)
    divergence.slope(log_p, log_q)
    assert torch.equal(log_p, kept[0])
    assert torch.equal(log_q, kept[1])


@pytest.mark.parametrize(
    ("kind", "mixture", "message"),
    [
        ("kl", None, "kind='kl' must be one of forward_kl, reverse_kl, jsd"),
        ("forward_kl", 0.5, "mixture=0.5 says nothing about kind forward_kl"),
        ("jsd", 1.5, "mixture=1.5 of jsd must lie in 0"),
        ("skew_forward_kl", 0, "0 is forward_kl itself"),
        ("skew_reverse_kl", 1, "mixture=1 of skew_reverse_kl must lie between"),
    ],
)
def test_what_does_not_exist_is_refused(kind: str, mixture: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence_of(kind, mixture)
