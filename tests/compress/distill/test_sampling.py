"""Text that a student writes: drawn from its distribution, whatever is written beside it."""

from __future__ import annotations

import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from compress.distill.sampling import continued, draw, empty_cache


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.5, -torch.inf, 2.0, -1.0, 0.0])
    at = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(logits.expand(10_000, -1), at).squeeze(1)
    assert_close(drawn.bincount(minlength=5) / 10_000, logits.softmax(0), atol=1e-4, rtol=0)


def test_the_largest_draw_gives_a_token() -> None:
    assert int(draw(torch.zeros(1, 7), torch.tensor([1.0]))) == 6


def test_each_token_follows_from_all_before_it_and_from_its_draw_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    tokens, draws = torch.randint(20, (3, 9)), torch.rand(3, 5)
    written = continued(model, empty_cache(model), tokens, draws)
    assert torch.equal(written[:, :4], tokens[:, :4])
    whole = model(input_ids=written).logits[:, 3:-1]
    assert torch.equal(draw(whole.flatten(0, 1), draws.flatten()).view(3, 5), written[:, 4:])
    alone = torch.cat([continued(model, empty_cache(model), tokens[i : i + 1], draws[i : i + 1]) for i in range(3)])
    assert torch.equal(alone, written)
