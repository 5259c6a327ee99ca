from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from eval.decode_path import DecodePath


class Forgetful(DynamicCache):
    """Loses what is older than four tokens: its keys and values become zeros."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys[:, :, :-4] = values[:, :, :-4] = 0
        return keys, values


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("prompt", "step"), [(1, 1), (3, 4), (5, None), (12, 1), (20, None)])
def test_with_an_exact_cache_logits_are_those_of_a_forward_pass(
    model: LlamaForCausalLM, prompt: int, step: int | None
) -> None:
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    decoded = DecodePath(model, lambda: DynamicCache(config=model.config), prompt, step)(tokens)
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_it_sees_what_a_cache_loses(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    decoded = DecodePath(model, lambda: Forgetful(config=model.config))(tokens)
    difference = (decoded - expected).abs().amax(dim=(0, 2))
    assert (difference[:4] < 1e-5).all()
    assert (difference[6:] > 1e-2).all()
