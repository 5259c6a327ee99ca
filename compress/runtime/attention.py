"""Attention as transformers calls it, over a cache that is read as it is stored.

`quantized_cache(model, scheme)` gives a cache to hand to `generate()` or to the model, and lets the model call what is
here: transformers knows it as the attention implementation `netsuke`. Where keys come as a `PackedLayer`, queries run
on `quant_kernels.kv_cache`: kernels on a GPU, on a CPU a reference that dequantizes a chunk at a time. A first prompt,
and a model with a cache of another kind, run on torch's attention.

Masks are made as for torch's attention, but a packed layer has no use for them: it knows which tokens a query sees.
They are read for the padding of the first prompt, and afterwards only compared, so that a mask which asks for something
else is refused and not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.core.kv import KV_SCHEMES, KVScheme, parse_kv_scheme
from compress.errors import RequestError
from compress.runtime.cache import PackedLayer, QuantizedCache, turned
from quant_kernels.kv_cache import attend
from quant_kernels.kv_reference import OnlineSoftmax

NAME = "netsuke"
"""What transformers calls it."""
QUERIES = 256
"""That are computed together."""

_CHECKED = WeakIdKeyDictionary()
"""Mask → the padding that it was found to say. All layers of a kind are given the same mask."""


def quantized_cache(
    model: Any, scheme: KVScheme | str | Sequence[KVScheme | str] | None = None,
    scales: Mapping[int, tuple[Tensor, Tensor]] | None = None, block_tokens: int | None = None,
) -> QuantizedCache:  # fmt: skip
    """An empty cache for a transformers model, which from now on can read it: `model.generate(…, past_key_values=…)`.

    `scheme`: one of `KV_SCHEMES` or its name, or a sequence with that of each layer; None: what the checkpoint says, if
    `compress.load` has loaded it. `scales`: number of a layer → scales of its keys and values [kv_heads], for fp8;
    None: those of the checkpoint. `block_tokens`: None for contiguous storage; a multiple of 32, for instance 64, for
    blocks of so many tokens: a sequence then takes only what its own length needs, and beams share their past. What is
    written is the same. Raises RequestError where there is no such scheme, or where the model's attention cannot be
    replaced.
    """
    scheme = getattr(model, "netsuke_kv_cache", None) if scheme is None else scheme
    scales = getattr(model, "netsuke_kv_scales", None) if scales is None else scales
    if scheme is None:
        raise RequestError("scheme: the checkpoint of this model names none. Give one of " + ", ".join(KV_SCHEMES))
    try:
        schemes = _parsed(scheme)
    except ValueError as error:
        raise RequestError(str(error)) from error
    cache = QuantizedCache(model.config, schemes, scales, block_tokens)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise RequestError(f"{type(model).__name__}: transformers cannot replace its attention, which therefore cannot "
                           "read a quantized cache. Leave the cache unquantized")  # fmt: skip
    return cache


def attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, scaling: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [batch, heads, queries, D] → [batch, queries, heads, D].

    Raises RequestError for masks and for kinds of softmax that a packed layer does not have.
    """
    if others.get("s_aux") is not None:
        raise RequestError(f"{type(module).__name__} has learned sinks in its softmax, which are not supported. Leave "
                           "the cache of this model unquantized")  # fmt: skip
    layer: Any = key if isinstance(key, PackedLayer) else None
    if layer is not None and layer.prompt is None:
        _check(attention_mask, layer, query.shape[2], others.get("position_bias"))
        y = packed_attention(query, layer, query.shape[3] ** -0.5 if scaling is None else scaling, softcap)
        return y.transpose(1, 2).contiguous(), None
    if layer is not None:
        key, value = layer.prompt
    if softcap is None:
        y, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    else:
        y = _capped(query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling, softcap)
    if layer is not None:
        layer.pack(_padding(attention_mask, len(query)))
    return y, None


def packed_attention(query: Tensor, layer: PackedLayer, scaling: float, soft_cap: float | None = None) -> Tensor:
    """Of queries [batch, heads, queries, D], which are the newest tokens of the layer. The result has their shape."""
    query = turned(query) if layer.scheme.rotated else query
    num_queries, device = query.shape[2], query.device
    keys, values = layer.sides
    outputs = []
    for start, end, quantized, recent, slots in layer.views(num_queries, QUERIES):
        more: dict[str, Any] = {}
        if layer.scheme.window:
            k_recent, v_recent = slots
            more = {"k_recent": k_recent, "v_recent": v_recent, "recent_lengths": _on(device, recent)}
        outputs.append(attend(
            query[:, :, start:end].contiguous(), keys.planes, values.planes, _on(device, quantized), scaling, **more,
            block_table=layer.storage.block_table, num_sinks=layer.scheme.sinks, sliding_window=layer.sliding_window,
            soft_cap=soft_cap,
        ))  # fmt: skip
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _parsed(scheme: KVScheme | str | Sequence[KVScheme | str]) -> KVScheme | list[KVScheme]:
    if isinstance(scheme, KVScheme):
        return scheme
    if isinstance(scheme, str):
        return parse_kv_scheme(scheme)
    return [parse_kv_scheme(each) if isinstance(each, str) else each for each in scheme]


def _on(device: torch.device, counts: list[int]) -> Tensor:
    """As int32. One number for all is filled in there, without waiting for a copy."""
    if len(set(counts)) == 1:
        return torch.full((len(counts),), counts[0], dtype=torch.int32, device=device)
    return torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, soft_cap: float) -> Tensor:
    """Of plain keys and values [batch, kv_heads, tokens, D], with capped logits, which torch's attention has not."""
    batch, _, num_queries, head_dim = query.shape
    num_tokens = key.shape[2]
    q = (query.float() * scaling).reshape(batch, key.shape[1], -1, num_queries, head_dim)
    token = torch.arange(num_tokens, device=query.device)
    outputs = []
    for start in range(0, num_queries, QUERIES):
        part = q[..., start : start + QUERIES, :]
        if mask is None:
            newest = torch.arange(start, start + part.shape[3], device=query.device) + num_tokens - num_queries
            visible = (token <= newest[:, None]).expand(batch, -1, -1)
        else:
            visible = mask[:, 0, start : start + QUERIES].expand(batch, -1, -1)
        softmax = OnlineSoftmax(part, soft_cap)
        softmax.add(key.float(), value.float(), visible)
        outputs.append(softmax.result())
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


def _padding(mask: Tensor | None, batch: int) -> list[int]:
    """Columns on the left of each sequence that no query of a first prompt sees."""
    if mask is None:
        return [0] * batch
    seen = (mask if mask.dtype == torch.bool else mask == 0).any(dim=2)[:, 0].expand(batch, -1)
    padding = seen.shape[1] - seen.sum(dim=1)
    if not torch.equal(seen, torch.arange(seen.shape[1], device=mask.device) >= padding[:, None]):
        raise RequestError("attention_mask: a prompt has padding after its first token. A quantized cache takes it on "
                           "the left only; set padding_side='left' in the tokenizer")  # fmt: skip
    return padding.tolist()


def _check(mask: Tensor | None, layer: PackedLayer, num_queries: int, bias: Tensor | None) -> None:
    """Raise RequestError where these newest tokens shall see anything but all tokens before them."""
    if mask is None and bias is None:
        return
    padding = tuple(layer.padding)
    if bias is None and mask is not None and mask.dtype == torch.bool:
        if _CHECKED.get(mask) == padding:
            return
        num_tokens = mask.shape[3]
        token = torch.arange(num_tokens, device=mask.device)
        newest = token[num_tokens - num_queries :, None]
        visible = (token >= torch.tensor(padding, device=mask.device)[:, None, None] - (layer.length - num_tokens)) & (
            token <= newest
        )
        if layer.sliding_window is not None:
            visible &= token > newest - layer.sliding_window
        if torch.equal(mask[:, 0].expand_as(visible), visible):
            _CHECKED[mask] = padding
            return
    raise RequestError("attention over a quantized cache: tokens see all that came before them but padding on the left "
                       "of the first prompt, and the mask says otherwise. Leave the cache unquantized")  # fmt: skip


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
