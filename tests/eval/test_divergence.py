"""Losses and divergences against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from eval.divergence import kl_divergence, token_losses, top1_agreement


def random_logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(3, 17, 33, generator=generator)).to(dtype)


def binary_logits(probability: float) -> torch.Tensor:
    """One window of two positions over two symbols, the first with the given probability."""
    return torch.tensor([probability, 1 - probability]).log().expand(1, 2, 2)


def test_uniform_logits_lose_the_log_of_the_vocabulary_on_every_token() -> None:
    tokens = torch.arange(8).view(2, 4)
    losses = token_losses(torch.full((2, 4, 50), 7.0), tokens)
    torch.testing.assert_close(losses, torch.full((2, 3), math.log(50)))


def test_a_loss_is_about_the_token_after_the_position() -> None:
    tokens = torch.tensor([[4, 0, 2, 3]])
    certain_of_the_next = 1e4 * torch.nn.functional.one_hot(tokens.roll(-1, dims=1), 5).float()
    assert token_losses(certain_of_the_next, tokens).tolist() == [[0, 0, 0]]


def test_a_model_has_no_divergence_from_itself() -> None:
    logits = random_logits(0)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(3, 16))


def test_a_model_agrees_with_itself_everywhere() -> None:
    logits = random_logits(0)
    assert top1_agreement(logits, logits).all()


def test_the_divergence_of_two_coins_is_the_textbook_one() -> None:
    divergence = kl_divergence(binary_logits(0.5), binary_logits(0.25))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence.item() == pytest.approx(expected, rel=1e-6)


def test_the_divergence_weighs_by_the_baseline() -> None:
    forward = kl_divergence(binary_logits(0.5), binary_logits(0.001)).item()
    backward = kl_divergence(binary_logits(0.001), binary_logits(0.5)).item()
    assert forward == pytest.approx(0.5 * math.log(500) + 0.5 * math.log(0.5 / 0.999), rel=1e-5)
    assert backward < math.log(2) < forward


def test_a_constant_added_to_all_logits_changes_no_divergence() -> None:
    logits = random_logits(0)
    assert kl_divergence(logits, logits + 5).max() < 1e-5


def test_the_divergence_is_never_negative() -> None:
    logits = random_logits(0)
    assert kl_divergence(logits, logits * (1 + 1e-7)).min() >= 0


def test_agreement_is_counted_position_by_position() -> None:
    base = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    model = torch.tensor([[[0.2, 0.3], [0.4, 0.6], [9.0, 0.0]]])
    assert top1_agreement(base, model).tolist() == [[True, False]]


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_losses_do_not_depend_on_the_size_of_a_chunk(rows: int) -> None:
    logits, tokens = random_logits(0), torch.arange(51).view(3, 17) % 33
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_losses(logits, tokens, chunk_bytes=rows * 4 * 33), expected)


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_divergences_do_not_depend_on_the_size_of_a_chunk(rows: int) -> None:
    base, model = random_logits(0), random_logits(1)
    log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (base, model))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(base, model, chunk_bytes=rows * 4 * 33), expected)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    base, model = random_logits(0, torch.bfloat16), random_logits(1, torch.bfloat16)
    assert torch.equal(kl_divergence(base, model), kl_divergence(base.float(), model.float()))
