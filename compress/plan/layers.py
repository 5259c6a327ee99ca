"""What becomes of one layer, and what each file of the result will hold, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.checkpoint import Format, kv_cache, sparse_24
from compress.checkpoint.adapter import adapter_layout
from compress.core.kv import KVScheme
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.headers import TensorHeader, tensor_bytes
from compress.models.selection import LayerName


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer."""

    name: str
    role: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    """[out, in], however the module stores it."""
    dtype: str
    stage: int | None
    """Index of the stage that quantizes it."""
    scheme: Scheme | None
    rank: int | None
    """Of the product that makes up for its rounding, if one does."""
    pruner: int | None
    """Index of the stage that prunes it."""
    compact: bool
    """Whether its zeros are left out of the file."""
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def action(self) -> str:
        return "quantize" if self.scheme else "keep" if self.pruner is None else "prune"


def num_blocks_of(config: Mapping[str, Any], anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> int:
    """Blocks the model runs. Files may hold more, heads that predict several tokens, say; those are only copied."""
    prefix = f"{anatomy.blocks}."
    stored = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int):
            return config[key]
    return len(stored)


def shape_of(header: TensorHeader, anatomy: Anatomy) -> tuple[int, int]:
    first, second = header.shape
    return (second, first) if anatomy.transposed else (first, second)


def layer_plan(
    layer: LayerName,
    anatomy: Anatomy,
    header: TensorHeader,
    owner: Mapping[str, int],
    schemes: Mapping[str, Scheme],
    ranks: Mapping[str, int],
    pruner: Mapping[str, int],
    reasons: Mapping[str, str],
    form: Format,
) -> LayerPlan:
    inside = layer.name.startswith(f"{anatomy.blocks}.")
    scheme, rank = schemes.get(layer.name), ranks.get(layer.name)
    shape = shape_of(header, anatomy) if inside else (header.shape[0], header.shape[1])
    held = {f"{layer.name}.weight": (header.dtype, header.shape)}
    if scheme:
        held = form.layout(layer.name, shape, scheme, header.dtype)
    compact = form.name == sparse_24.NAME and layer.name in pruner
    if compact:
        held = sparse_24.layout(layer.name, shape, header.dtype)
    if rank and form.packs:
        held |= adapter_layout({layer.name: (shape[0], rank, shape[1])})
    return LayerPlan(
        name=layer.name,
        role=layer.role,
        kind=layer.kind,
        block=int(layer.name.removeprefix(f"{anatomy.blocks}.").split(".")[0]) if inside else None,
        shape=shape,
        dtype=header.dtype,
        stage=owner.get(layer.name),
        scheme=scheme,
        rank=rank,
        pruner=pruner.get(layer.name),
        compact=compact,
        reason="" if scheme or layer.name in pruner else reasons.get(layer.name, "no stage names it"),
        bytes_before=header.nbytes,
        bytes_after=sum(tensor_bytes(*entry) for entry in held.values()),
    )


def shards_of(
    anatomy: Anatomy,
    tensors: Mapping[str, TensorHeader],
    num_blocks: int,
    layers: Mapping[str, LayerPlan],
    form: Format,
    cache: KVScheme | None,
    kv_heads: int,
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], ...]:
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(num_blocks + 1)]
    for name, header in tensors.items():
        inside = name.startswith(f"{anatomy.blocks}.")
        index = int(name.removeprefix(f"{anatomy.blocks}.").split(".")[0]) if inside else num_blocks
        shard = shards[min(index, num_blocks)]
        layer = layers.get(name.removesuffix(".weight"))
        if layer and layer.scheme and name.endswith(".weight"):
            held = form.layout(header.name.removesuffix(".weight"), layer.shape, layer.scheme, header.dtype)
            turned = anatomy.transposed
            shard |= {key: (dtype, shape[::-1] if turned else shape) for key, (dtype, shape) in held.items()}
        elif layer and layer.compact and name.endswith(".weight"):
            shard |= sparse_24.layout(header.name.removesuffix(".weight"), layer.shape, header.dtype)
        else:
            shard[header.name] = header.dtype, header.shape
        if cache and layer and layer.role == "attn.o" and name.endswith(".weight"):
            shard |= kv_cache.layout(header, cache, kv_heads)
    return tuple(shards)
