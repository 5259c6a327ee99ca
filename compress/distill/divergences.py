"""Divergences: how far a student's distribution q of the next token is from its teacher's, p.

Each is a sum over tokens v of something that depends on log p_v and log q_v alone:

    forward KL          Σ p (log p - log q)             the student must cover all that the teacher does
    reverse KL          Σ q (log q - log p)             it must not go where the teacher does not
    Jensen–Shannon      β KL(p ‖ m) + (1 - β) KL(q ‖ m),            m = β p + (1 - β) q
    skew forward KL     KL(p ‖ α p + (1 - α) q)         bounded by -log α, whatever the student leaves out
    skew reverse KL     KL(q ‖ α q + (1 - α) p)
    total variation     ½ Σ |p - q|                     the share of a draft's tokens that its teacher refuses

(Hinton et al., arXiv 1503.02531; GKD, arXiv 2306.13649; DistiLLM, arXiv 2402.03898; DistillSpec, arXiv 2310.08461.)
As β goes to 0 the Jensen–Shannon divergence goes to 0 like β · forward KL, as it goes to 1 like (1 - β) · reverse KL.
At 0 and 1 themselves it is the two, as GKD has it.

The slope is ∂/∂(log q_v), short of multiples of q: what it gives to all logits alike, a softmax does not see. With
q = softmax(z / T), the gradient in the logits is (slope - q Σ slope) / T. Written down, it needs no graph and no
temporaries but its own; with mixtures it is also simpler than what autograd would find, as the parts that come
through m cancel.

A probability of 0 (log -∞) has no term of its own. Where one distribution has none and the other does, a plain KL is
infinite, as it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
Logs = Float[Tensor, "tokens outcomes"]


class Divergence(Protocol):
    """One of the six; arguments are logarithms of probabilities, results new tensors of their shape."""

    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        """What the divergence is the sum of."""

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        """Their sum's derivative in log q, short of a multiple of q."""


@dataclass(frozen=True)
class ForwardKL:
    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        return _kl(log_p, log_q)

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        return log_p.exp().neg_()


@dataclass(frozen=True)
class ReverseKL:
    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        return _kl(log_q, log_p)

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        return _kl(log_q, log_p)


@dataclass(frozen=True)
class JensenShannon:
    beta: float = 0.5
    """The teacher's share in the mixture, from 0 (forward KL) to 1 (reverse KL)."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"mixture={self.beta} of jsd must lie in 0 … 1; 0.5 treats both alike")

    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        if self.beta in (0, 1):
            return _kl(log_q, log_p) if self.beta else _kl(log_p, log_q)
        log_m = _mixture(log_p, log_q, self.beta)
        return _kl(log_p, log_m).mul_(self.beta).add_(_kl(log_q, log_m), alpha=1 - self.beta)

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        if self.beta in (0, 1):
            return _kl(log_q, log_p) if self.beta else log_p.exp().neg_()
        return _kl(log_q, _mixture(log_p, log_q, self.beta)).mul_(1 - self.beta)


@dataclass(frozen=True)
class SkewForwardKL:
    alpha: float = 0.1
    """The share of the teacher's own distribution in what it is compared with."""

    def __post_init__(self) -> None:
        _check_skew("forward_kl", self.alpha)

    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        return _kl(log_p, _mixture(log_p, log_q, self.alpha))

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        """-(1 - α) p q / m, as p (α p / m - 1)."""
        share = _log_ratio(log_p, _mixture(log_p, log_q, self.alpha)).exp_().mul_(self.alpha)
        return share.sub_(1).mul_(log_p.exp())


@dataclass(frozen=True)
class SkewReverseKL:
    alpha: float = 0.1
    """The share of the student's own distribution in what it is compared with."""

    def __post_init__(self) -> None:
        _check_skew("reverse_kl", self.alpha)

    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        return _kl(log_q, _mixture(log_q, log_p, self.alpha))

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        """q (log q - log m - α q / m)."""
        ratio = _log_ratio(log_q, _mixture(log_q, log_p, self.alpha))
        return ratio.sub_(ratio.exp(), alpha=self.alpha).mul_(log_q.exp())


@dataclass(frozen=True)
class TotalVariation:
    def terms(self, log_p: Logs, log_q: Logs) -> Logs:
        return log_p.exp().sub_(log_q.exp()).abs_().div_(2)

    def slope(self, log_p: Logs, log_q: Logs) -> Logs:
        return _log_ratio(log_q, log_p).sign_().mul_(log_q.exp()).div_(2)


PLAIN: dict[str, Callable[..., Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "total_variation": TotalVariation,
}
MIXED: dict[str, Callable[..., Divergence]] = {
    "jsd": JensenShannon,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
}


def divergence_of(kind: Kind, mixture: float | None = None) -> Divergence:
    """The divergence of this name; `mixture`: β or α, None for the usual one. ValueError on what does not exist."""
    if kind in MIXED:
        return MIXED[kind]() if mixture is None else MIXED[kind](mixture)
    if kind not in PLAIN:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(Kind))}")
    if mixture is not None:
        raise ValueError(f"mixture={mixture} says nothing about kind {kind}; leave it out, or use {', '.join(MIXED)}")
    return PLAIN[kind]()


def _kl(log_a: Logs, log_b: Logs) -> Logs:
    return _log_ratio(log_a, log_b).mul_(log_a.exp())


def _log_ratio(log_a: Logs, log_b: Logs) -> Logs:
    """log a - log b, 0 where a is 0."""
    return (log_a - log_b).masked_fill_(log_a == -torch.inf, 0)


def _mixture(log_a: Logs, log_b: Logs, share: float) -> Logs:
    """log(share · a + (1 - share) · b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _check_skew(of: str, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"mixture={alpha} of skew_{of} must lie between 0 and 1; 0.1 is usual, and 0 is {of} itself")
