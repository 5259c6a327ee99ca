"""A model with a packed cache writes what it writes when its keys and values are dequantized first."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from compress.core.hadamard import factors, kronecker
from compress.core.kv import KV_SCHEMES, KVScheme
from compress.errors import RequestError
from compress.runtime.attention import attention, quantized_cache
from compress.runtime.cache import PackedLayer
from compress.runtime.side import kv_format
from quant_kernels.kv_planes import dequantize, quantize

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.3, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, sliding_window=170, attn_logit_softcapping=4.0)),
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
}
every_scheme = pytest.mark.parametrize("scheme", KV_SCHEMES.values(), ids=KV_SCHEMES)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return made("llama")


@pytest.fixture(scope="module")
def gemma() -> Any:
    return made("gemma")


def made(name: str) -> Any:
    torch.manual_seed(len(name))
    return MODELS[name]().eval()


def text(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


class ExpandedLayer(DynamicLayer):
    """All tokens as they came, and given to attention as the scheme would have rounded them."""

    def __init__(self, scheme: KVScheme, is_sliding: bool) -> None:
        super().__init__()
        self.scheme, self.is_sliding = scheme, is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        if not before:
            return keys, values
        end = self.scheme.sinks + self.scheme.num_quantized(before if self.scheme.window else keys.shape[2])
        return self._rounded(keys, "keys", end), self._rounded(values, "values", end)

    def _rounded(self, x: Tensor, side: str, end: int) -> Tensor:
        begin, grid = self.scheme.sinks, kv_format(getattr(self.scheme, side))
        matrix = kronecker(torch.eye(x.shape[3]), factors(x.shape[3]))
        turns = self.scheme.rotated and side == "keys"
        part = x[:, :, begin:end] @ matrix if turns else x[:, :, begin:end]
        part = dequantize(
            quantize(part, grid, static_scale=torch.ones(x.shape[1]) if self.scheme.static else None), grid
        )
        return torch.cat((x[:, :, :begin], part @ matrix.T if turns else part, x[:, :, end:]), dim=2)


def expanded_cache(model: Any, scheme: KVScheme) -> Cache:
    """And plain attention, with softmax written out, to read it."""
    model.set_attn_implementation("eager")
    sliding = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [""] * 2]
    return Cache(layers=[ExpandedLayer(scheme, each) for each in sliding])


def option(model: Any, cache: Any) -> dict[str, Any]:
    """Under the name that this version of transformers has for it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def written(model: Any, cache: Any, prompt: Tensor, num_tokens: int = 10, **options: Any) -> Tensor:
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
    tokens = model.generate(prompt, max_new_tokens=num_tokens, **option(model, cache), **options)
    return tokens[:, prompt.shape[1] :]


def logits(model: Any, cache: Any, tokens: Tensor, steps: list[int]) -> Tensor:
    """Of the tokens, given to the model so many at a time."""
    with torch.inference_mode():
        return torch.cat([model(part, **option(model, cache)).logits for part in tokens.split(steps, dim=1)], dim=1)


@every_scheme
def test_it_writes_what_the_dequantized_cache_writes(model: Any, scheme: KVScheme) -> None:
    prompt = text(191)  # a group leaves the window on the way
    cache = quantized_cache(model, scheme)
    tokens = written(model, cache, prompt, 8)
    assert torch.equal(tokens, written(model, expanded_cache(model, scheme), prompt, 8))
    assert cache.layers[1].num_quantized == [scheme.num_quantized(197 if scheme.window else 198)]


@every_scheme
def test_logits_are_those_of_the_dequantized_cache_and_not_of_the_full_one(llama: Any, scheme: KVScheme) -> None:
    tokens, steps = text(199), [191] + [1] * 8
    found = logits(llama, quantized_cache(llama, scheme), tokens, steps)
    wanted = logits(llama, expanded_cache(llama, scheme), tokens, steps)
    full = logits(llama, DynamicCache(config=llama.config), tokens, [199])
    torch.testing.assert_close(found[:, :191], full[:, :191], rtol=0, atol=1e-4)
    assert (found - wanted)[:, 191:].abs().mean() < 0.02 * (found - full)[:, 191:].abs().mean()  # a code may differ


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_a_prompt_that_comes_in_chunks_is_read_as_if_it_came_token_by_token(gemma: Any, name: str) -> None:
    tokens = text(240)
    chunks = logits(gemma, quantized_cache(gemma, name), tokens, [180, 40, 20])
    single = logits(gemma, quantized_cache(gemma, name), tokens, [180] + [1] * 60)
    full = logits(gemma, DynamicCache(config=gemma.config), tokens, [240])
    assert (chunks - single)[:, 180:].abs().mean() < 0.05 * (chunks - full)[:, 180:].abs().mean()


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_sampling_draws_what_the_dequantized_cache_draws(llama: Any, name: str) -> None:
    scheme, draws = KV_SCHEMES[name], []
    for cache in (quantized_cache(llama, scheme), None):
        cache = cache or expanded_cache(llama, scheme)
        torch.manual_seed(1)
        draws.append(written(llama, cache, text(191), do_sample=True, temperature=0.7))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], written(llama, quantized_cache(llama, scheme), text(191)))


@pytest.mark.parametrize("name", ["kv8", "kv4", "kv2-rotated"])
def test_beams_are_those_of_the_dequantized_cache(llama: Any, name: str) -> None:
    scheme, options = KV_SCHEMES[name], {"num_beams": 3, "num_return_sequences": 3}
    found = written(llama, quantized_cache(llama, scheme), text(191), **options)
    assert torch.equal(found, written(llama, expanded_cache(llama, scheme), text(191), **options))
    assert len({tuple(beam) for beam in found.tolist()}) == 3


@pytest.mark.parametrize(
    ("name", "options"), [("fp8", {}), ("kv4", {}), ("kv2-rotated", {"num_beams": 2}), ("kv4", {"num_beams": 2})]
)
def test_a_batch_of_unequal_prompts_is_written_as_each_alone(model: Any, name: str, options: dict[str, Any]) -> None:
    prompts = [text(length, length) for length in (191, 160, 100)]
    batch = torch.cat([torch.nn.functional.pad(each, (191 - each.shape[1], 0)) for each in prompts])
    together = written(model, quantized_cache(model, name), batch, 8, attention_mask=(batch > 0).long(), **options)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(written(model, quantized_cache(model, name), prompt, 8, **options)[0], tokens)


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_drafted_tokens_do_not_change_what_is_written(model: Any, name: str) -> None:
    prompt = text(12).repeat(1, 15)
    greedy = written(model, quantized_cache(model, name), prompt, 12)
    for options in ({"assistant_model": made("llama")}, {"prompt_lookup_num_tokens": 4}):
        cache = quantized_cache(model, name)
        assert torch.equal(written(model, cache, prompt, 12, **options), greedy)
        assert all(layer.record_past for layer in cache.layers)


def test_a_prompt_in_chunks_is_continued(llama: Any) -> None:
    tokens = written(llama, quantized_cache(llama, "kv8"), text(191), prefill_chunk_size=50)
    assert torch.equal(
        tokens, written(llama, expanded_cache(llama, KV_SCHEMES["kv8"]), text(191), prefill_chunk_size=50)
    )


def test_a_cache_goes_on_where_it_was_left(llama: Any) -> None:
    cache, prompt = quantized_cache(llama, "kv4"), text(191)
    first = written(llama, cache, prompt, 5)
    longer = torch.cat((prompt, first), dim=1)
    assert torch.equal(
        torch.cat((first, written(llama, cache, longer, 5)), dim=1),
        written(llama, quantized_cache(llama, "kv4"), prompt, 10),
    )


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_bfloat16_is_near_float32(name: str) -> None:
    model, tokens, steps = made("llama"), text(250), [200, 30, 1, 19]
    exact = logits(model, quantized_cache(model, name), tokens, steps)
    model = model.to(torch.bfloat16)
    cache = quantized_cache(model, name)
    rounded = logits(model, cache, tokens, steps).float()
    plain = logits(model, DynamicCache(config=model.config), tokens, steps).float()
    assert (rounded - exact).norm() < 1.2 * (plain - exact).norm() + 0.05 * exact.norm()
    assert {side.planes.scale.dtype for side in cache.layers[0].sides} == {torch.bfloat16}


def test_with_a_cache_of_another_kind_it_is_plain_attention(model: Any) -> None:
    tokens, steps = text(200), [180, 7, 1, 12]
    padded = torch.nn.functional.pad(text(150, 1), (30, 0))
    quantized_cache(model, "kv4")
    found = logits(model, DynamicCache(config=model.config), tokens, steps)
    with_mask = model(padded, attention_mask=(padded > 0).long(), use_cache=False).logits[:, 30:]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(
        found, logits(model, DynamicCache(config=model.config), tokens, steps), rtol=0, atol=1e-4
    )
    plain = model(padded, attention_mask=(padded > 0).long(), use_cache=False).logits[:, 30:]
    torch.testing.assert_close(with_mask, plain, rtol=0, atol=1e-4)


def test_padding_on_the_right_is_refused(llama: Any) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with pytest.raises(RequestError, match="padding after its first token.* padding_side='left'"):
        llama(text(9, batch=2), attention_mask=mask, **option(llama, quantized_cache(llama, "kv4")))


@pytest.mark.parametrize("queries", [1, 3])
def test_a_mask_that_hides_other_tokens_is_refused(gemma: Any, queries: int) -> None:
    cache = quantized_cache(gemma, "kv8")
    gemma(text(9), **option(gemma, cache))
    mask = torch.ones(1, 9 + queries, dtype=torch.long)
    gemma(text(queries), attention_mask=mask, **option(gemma, cache))
    mask = torch.ones(1, 9 + 2 * queries, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(RequestError, match="tokens see all that came before them but padding on the left"):
        gemma(text(queries), attention_mask=mask, **option(gemma, cache))


def test_a_mask_of_ones_own_is_refused(llama: Any) -> None:
    cache = quantized_cache(llama, "kv8")
    llama(text(9), **option(llama, cache))
    with pytest.raises(RequestError, match="the mask says otherwise"):
        llama(text(1), attention_mask=torch.zeros(1, 1, 1, 10), **option(llama, cache))


@pytest.mark.parametrize("extra", ["s_aux", "position_bias"])
def test_a_softmax_of_another_kind_is_refused(extra: str) -> None:
    layer = PackedLayer(KV_SCHEMES["kv8"])
    module = types.SimpleNamespace(num_key_value_groups=1, is_causal=True)
    x = torch.ones(1, 2, 4, 32)
    attention(module, x, *layer.update(x, x), None)
    with pytest.raises(RequestError, match="cache"):
        attention(module, x, *layer.update(x, x), None, **{extra: torch.zeros(2)})


def test_an_unknown_scheme_is_answered_with_those_there_are(llama: Any) -> None:
    with pytest.raises(RequestError, match="unknown KV cache scheme 'kv5'; there are fp8, fp8-head, kv8"):
        quantized_cache(llama, "kv5")


def test_a_model_whose_attention_cannot_be_replaced_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=2))
    with pytest.raises(RequestError, match="BloomForCausalLM: transformers cannot replace its attention"):
        quantized_cache(model, "kv8")
