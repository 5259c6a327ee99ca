"""Token losses: one number for each token from a student's logits and what its teacher thinks.

    loss_t = T² · D(p_t, q_t)        p, q = softmax(logits / T), D one of `compress.distill.divergences`

T² keeps gradients at one size whatever the temperature (arXiv 1503.02531). A teacher is either its logits, or a `TopK`:
the k tokens it thinks likeliest and, in one bucket, all others. Then q is put into the same k + 1 buckets and the two
are compared there, which is exact for those tokens and blind to how the rest is spread. No bucket is scaled to make
up for another. Putting tokens together never makes distributions more different, so such a loss is a lower bound of
the whole one; for forward KL it lacks p_tail · KL(p ‖ q among the others), and nothing with k = vocabulary. The
cross-entropy is the forward KL from a teacher that is certain: k = 1, and nothing in the tail.

Arithmetic is float32 (float64 where logits are), some tokens at a time. A vocabulary of 128k has 1 GB of float32
numbers for 2048 tokens, and a graph would keep several of them; here one autograd Function keeps what it was given,
and its backward pass computes everything anew, again some tokens at a time. What grows with the number of tokens is
the gradient alone, in the dtype of the logits. Gradients reach the student, never the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.distill.divergences import Divergence, ForwardKL

CHUNK_BYTES = 32 << 20
"""The size of one float32 temporary; no function here holds more than six."""


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's distributions, cut off after the k likeliest tokens."""

    indices: Int[Tensor, "*tokens k"]
    """Their ids, different ones for each token."""
    log_probs: Float[Tensor, "*tokens k+1"]
    """Of each of them and, last, of all others together: -∞ where there are no others."""
    temperature: float = 1.0
    """At which they are probabilities; what they were at another cannot be told."""


def token_losses(
    logits: Float[Tensor, "*tokens vocabulary"],
    teacher: Float[Tensor, "*tokens vocabulary"] | TopK,
    divergence: Divergence,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "*tokens"]:
    """T² · D of every token, in nats, in float32. Rounding may leave an identical student a little below 0.

    Raises ValueError where shapes do not fit, and where a `TopK` is of another temperature.
    """
    if isinstance(teacher, TopK):
        if teacher.temperature != temperature:
            raise ValueError(
                f"the cached teacher has probabilities of temperature {teacher.temperature:g}, which cannot be turned "
                f"into those of temperature={temperature:g}; cache it again, or train at its own"
            )
        indices, beliefs = teacher.indices, teacher.log_probs
        fits = beliefs.shape == (*indices.shape[:-1], indices.shape[-1] + 1) and indices.shape[-1] <= logits.shape[-1]
        fits &= indices.shape[:-1] == logits.shape[:-1]
        indices = indices.reshape(-1, indices.shape[-1])
    else:
        indices, beliefs, fits = None, teacher, teacher.shape == logits.shape
    if not fits:
        raise ValueError(
            f"logits {list(logits.shape)} do not fit a teacher's {list(beliefs.shape)}: both need the same tokens, and "
            "one vocabulary. Cut padded rows off the larger output layer"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    beliefs = beliefs.reshape(-1, beliefs.shape[-1])
    return _TokenLosses.apply(flat, beliefs, indices, divergence, temperature, chunk_bytes).view(logits.shape[:-1])


def cross_entropy(
    logits: Float[Tensor, "*tokens vocabulary"], targets: Int[Tensor, "*tokens"], chunk_bytes: int = CHUNK_BYTES
) -> Float[Tensor, "*tokens"]:
    """Negative log-likelihood in nats of `targets`, the token after each. What is below 0 (-100, say) counts as 0."""
    certain = torch.tensor([0, -torch.inf], device=logits.device).expand(*targets.shape, 2)
    return token_losses(logits, TopK(targets.clamp(min=0).unsqueeze(-1), certain), ForwardKL(), 1.0, chunk_bytes)


def mean_over_valid(
    losses: Float[Tensor, "*tokens"], valid: Bool[Tensor, "*tokens"], count: int | None = None
) -> Float[Tensor, ""]:
    """The sum over valid tokens, divided by their number, at least 1; what the others hold does not matter.

    `count`: divide by this instead. Where gradients of several batches add up, it is the number of valid tokens in
    all of them; the mean of means would count a token of a short batch for more.
    """
    return losses.where(valid, 0).sum() / max(1, int(valid.sum()) if count is None else count)


class _TokenLosses(torch.autograd.Function):
    """Losses of [tokens, vocabulary]; beliefs are logits or, with indices [tokens, k], k + 1 log-probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        beliefs: Tensor,
        indices: Tensor | None,
        divergence: Divergence,
        temperature: float,
        chunk_bytes: int,
    ) -> Tensor:
        ctx.save_for_backward(logits, beliefs, indices)
        ctx.divergence, ctx.temperature, ctx.chunk_bytes = divergence, temperature, chunk_bytes
        losses = torch.empty(len(logits), dtype=_wide(logits), device=logits.device)
        for rows in _chunks(logits, chunk_bytes):
            log_q = _log_softmax(logits[rows], temperature)
            if indices is None:
                log_p = _log_softmax(beliefs[rows], temperature)
            else:
                log_p, log_q = beliefs[rows].to(log_q.dtype), _in_buckets(log_q, indices[rows])[0]
            losses[rows] = divergence.terms(log_p, log_q).sum(dim=-1)
        return losses.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:
        logits, beliefs, indices = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits, ctx.chunk_bytes):
            log_q = _log_softmax(logits[rows], ctx.temperature)
            if indices is None:
                slope = ctx.divergence.slope(_log_softmax(beliefs[rows], ctx.temperature), log_q)
                total = slope.sum(dim=-1, keepdim=True)
            else:
                bucketed, rest = _in_buckets(log_q, indices[rows])
                slopes = ctx.divergence.slope(beliefs[rows].to(log_q.dtype), bucketed)
                total = slopes.sum(dim=-1, keepdim=True)
                # A token's share of its bucket is what it moves of it: all for the k, q / q_tail for the others.
                tail = bucketed[:, -1:].clamp(min=torch.finfo(log_q.dtype).min)
                slope = rest.sub_(tail).exp_().mul_(slopes[:, -1:]).scatter_(-1, indices[rows], slopes[:, :-1])
            slope.sub_(log_q.exp_().mul_(total))
            scale = wanted[rows].unsqueeze(-1) * ctx.temperature
            gradient[rows] = slope.mul_(scale).masked_fill_(scale == 0, 0)  # 0 times NaN, where a token is not valid
        return gradient, None, None, None, None, None


def _in_buckets(
    log_q: Float[Tensor, "tokens vocabulary"], indices: Int[Tensor, "tokens k"]
) -> tuple[Float[Tensor, "tokens k+1"], Float[Tensor, "tokens vocabulary"]]:
    """Log-probabilities of the k tokens and of all others together; and of each of the others, -∞ for the k."""
    rest = log_q.scatter(-1, indices, -torch.inf)
    return torch.cat([log_q.gather(-1, indices), rest.logsumexp(dim=-1, keepdim=True)], dim=-1), rest


def _log_softmax(logits: Float[Tensor, "tokens vocabulary"], temperature: float) -> Float[Tensor, "tokens vocabulary"]:
    wide = logits.to(_wide(logits))
    return F.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Float[Tensor, "tokens vocabulary"], chunk_bytes: int) -> Iterator[slice]:
    """Slices of tokens whose float32 logits fit in `chunk_bytes`, or of one token."""
    size = max(1, chunk_bytes // (4 * logits.shape[1]))
    for start in range(0, len(logits), size):
        yield slice(start, start + size)
