"""Decoding into a cache of fixed size writes what transformers writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compress.runtime.decode import Decoder

PROMPT = torch.arange(1, 13).view(2, 6)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def gemma2_with_a_short_window() -> Any:
    config = Gemma2Config(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4)  # fmt: skip
    return Gemma2ForCausalLM(config)


def written(decoder: Decoder, prompt: Tensor, num_tokens: int) -> Tensor:
    tokens = [decoder.prefill(prompt)]
    while len(tokens) < num_tokens:
        tokens.append(decoder.step(tokens[-1]))
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2_with_a_short_window])
def test_it_writes_what_transformers_writes_from_the_whole_text_each_time(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    text = PROMPT
    with torch.no_grad():
        for _ in range(8):
            text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written(Decoder(model, 16), PROMPT, 8), text[:, 6:])


def test_a_second_prompt_sees_nothing_of_the_first() -> None:
    torch.manual_seed(0)
    decoder = Decoder(llama().eval(), 16)
    first = written(decoder, PROMPT, 8)
    written(decoder, PROMPT.flip(1), 8)
    assert torch.equal(written(decoder, PROMPT, 8), first)


def test_the_cache_is_allocated_once() -> None:
    torch.manual_seed(0)
    decoder = Decoder(llama().eval(), 16)
    decoder.prefill(PROMPT)
    keys = decoder.cache.layers[0].keys
    place = keys.data_ptr()
    written(decoder, PROMPT, 8)
    assert keys.shape[-2] == 16
    assert decoder.cache.layers[0].keys.data_ptr() == place


@pytest.mark.gpu
@pytest.mark.parametrize("build", [llama, gpt2, gemma2_with_a_short_window])
def test_a_captured_step_writes_what_an_eager_one_writes(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval().cuda()
    decoder, eager = Decoder(model, 16), Decoder(model, 16)
    eager._capture = lambda batch: None  # type: ignore[method-assign]
    for prompt in (PROMPT.cuda(), PROMPT.flip(1).cuda()):
        assert torch.equal(written(decoder, prompt, 8), written(eager, prompt, 8))
    assert (decoder._graph is not None) == decoder.captures
    assert eager._graph is None
