"""How far a model's next-token distributions are from the text, and from those of a baseline.

Perplexity asks how much probability the model gives to the token that came. It can stand still while the
model changes: gains on some tokens pay for losses on others. Two measures see through that, both against the
model that was compressed, on the same tokens: the Kullback–Leibler divergence KL(baseline ‖ model), the nats
lost by using the model's distribution in place of the baseline's, and the share of positions where both would
choose the same token. "Accuracy is Not All You Need" (arXiv 2407.09141) makes the case for the two.

Logits are [n, context, vocabulary] in any floating dtype; position t predicts token t + 1, so each function
returns [n, context - 1]. Arithmetic is float32 over the whole vocabulary, done some positions at a time: with
128k tokens in the vocabulary, a float32 copy of one window of 2048 positions would be 1 GB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""The size of one float32 temporary; no function here holds more than five."""


def token_losses(logits: Tensor, tokens: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Negative log-likelihood in nats of each token [n, context] but the first of its window."""
    losses = _per_prediction(logits)
    for window, positions in _chunks(logits, chunk_bytes):
        targets = tokens[window, 1:][positions]
        losses[window, positions] = F.cross_entropy(logits[window, positions].float(), targets, reduction="none")
    return losses


def kl_divergence(base_logits: Tensor, logits: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """KL(baseline ‖ model) in nats at each predicting position; rounding below zero is cut off at zero."""
    divergences = _per_prediction(logits)
    for window, positions in _chunks(logits, chunk_bytes):
        log_base = F.log_softmax(base_logits[window, positions].float(), dim=-1)
        log_model = F.log_softmax(logits[window, positions].float(), dim=-1)
        divergences[window, positions] = (log_base.exp() * (log_base - log_model)).sum(dim=-1)
    return divergences.clamp_min_(0)


def top1_agreement(base_logits: Tensor, logits: Tensor) -> Tensor:
    """True where baseline and model put the same token first (the lowest id among equals)."""
    return base_logits[:, :-1].argmax(dim=-1) == logits[:, :-1].argmax(dim=-1)


def _per_prediction(logits: Tensor) -> Tensor:
    num_windows, context, _ = logits.shape
    return torch.empty(num_windows, context - 1, dtype=torch.float32, device=logits.device)


def _chunks(logits: Tensor, chunk_bytes: int) -> Iterator[tuple[int, slice]]:
    """Window by window, slices of predicting positions whose float32 logits fit in `chunk_bytes`."""
    num_windows, context, vocabulary = logits.shape
    size = max(1, chunk_bytes // (4 * vocabulary))
    for window in range(num_windows):
        for start in range(0, context - 1, size):
            yield window, slice(start, min(start + size, context - 1))
