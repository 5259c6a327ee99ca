"""What a checkpoint says of the KV cache, and the scales that calibration has fixed for it.

Such scales lie beside the projections of each attention layer as `k_scale` and `v_scale`, [1] for all heads or
[kv_heads, 1, 1], and `quantization_config.kv_cache_scheme` tells of them: compressed-tensors' convention, which serving
engines read. Schemes whose scales follow the data need nothing but their name. It stands in an entry of config.json
that only this project reads and others pass over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.core.kv import KV_SCHEMES, KVScheme, heads_of
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import Weights

Scales = tuple[Tensor, Tensor]
"""Of keys and of values, float32, [1] or [kv_heads]."""
STRATEGIES = {False: "tensor", True: "attn_head"}
"""What compressed-tensors calls one scale for all heads, and one for each."""


def with_cache(config: Mapping[str, Any], scheme: KVScheme | Sequence[str]) -> dict[str, Any]:
    """A config.json that says the model is to keep keys and values in this scheme, or each layer in one of these."""
    if not isinstance(scheme, KVScheme):
        return {**config, "netsuke": {"kv_cache": {"schemes": [*scheme]}}}
    if not scheme.static:
        return {**config, "netsuke": {"kv_cache": {"scheme": scheme.name}}}
    entry = {
        "num_bits": scheme.keys.bits,
        "type": "float",
        "strategy": STRATEGIES[scheme.by_head],
        "symmetric": True,
        "dynamic": False,
    }
    return {**config, "quantization_config": {**config["quantization_config"], "kv_cache_scheme": entry}}


def scheme_of(config: Mapping[str, Any]) -> str | list[str] | None:
    """The name of the scheme that a config.json asks for, if we have it; where they differ, that of each layer."""
    ours = (config.get("netsuke") or {}).get("kv_cache") or {}
    named = ours.get("scheme") or ours.get("schemes")
    entry = (config.get("quantization_config") or {}).get("kv_cache_scheme") or {}
    if named or (entry.get("num_bits"), entry.get("type")) != (8, "float") or entry.get("dynamic"):
        return named
    by_head = STRATEGIES[True] == entry.get("strategy")
    return next(name for name, scheme in KV_SCHEMES.items() if scheme.static and scheme.by_head == by_head)


def layout(output: TensorHeader, scheme: KVScheme, kv_heads: int) -> Entries:
    """Tensor name → (type, shape) of the scales of one layer. `output`: the weight of its output projection."""
    shape = (kv_heads, 1, 1) if scheme.by_head else (1,)
    return dict.fromkeys(_names(output), (output.dtype, shape))


def encode(output: TensorHeader, scales: Scales, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of one layer, in the type of its weight."""
    shape = (1,) if scales[0].numel() == 1 else (-1, 1, 1)
    return {name: scale.to(dtype).view(shape).cpu() for name, scale in zip(_names(output), scales, strict=True)}


def read_scales(weights: Weights) -> dict[int, Scales]:
    """Number of each layer that has calibrated scales → these, [kv_heads] each. Raises ModelError where only keys have
    one."""
    kv_heads, _ = heads_of(weights.folder.config)
    scales = {}
    for name in weights.tensors:
        found = re.fullmatch(rf"{re.escape(weights.anatomy.blocks)}\.(\d+)\.(.+\.)?k_scale", name)
        if not found:
            continue
        names = name, f"{name.removesuffix('k_scale')}v_scale"
        if names[1] not in weights:
            raise ModelError(f"{names[1]}: is missing, while there is {name}")
        k_scale, v_scale = (weights.read(each).float().view(-1).expand(kv_heads) for each in names)
        scales[int(found[1])] = k_scale, v_scale
    return scales


def _names(output: TensorHeader) -> tuple[str, str]:
    """What the two scales of the attention layer with this output projection are called."""
    attention = output.name.rsplit(".", 2)[0]
    return f"{attention}.k_scale", f"{attention}.v_scale"
