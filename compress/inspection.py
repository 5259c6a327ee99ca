"""What a checkpoint holds, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint import format_of
from compress.models import anatomy_for
from compress.models.headers import TensorHeader, canonical, read_folder
from compress.models.store import read_tensor


def inspect(path: Path) -> dict[str, Any]:
    """What `netsuke inspect` prints: format, layers with scheme, shape and bytes, bits per weight, KV cache."""
    folder = read_folder(path)
    config = folder.config
    anatomy = anatomy_for(config, folder.shapes)
    tensors = canonical(folder.tensors, anatomy)
    quantization = config.get("quantization_config")
    form = format_of(config) if quantization else None
    grids = form.grids(quantization, tensors) if form and quantization else {}
    owners: dict[str, list[str]] = {}
    for name in tensors:
        owner = next((layer for layer in (name.rpartition(".")[0],) if layer in grids), name.removesuffix(".weight"))
        owners.setdefault(owner, []).append(name)
    layers = []
    weights = bits = 0
    for layer, names in owners.items():
        total = sum(tensors[name].nbytes for name in names if not name.endswith(".bias"))
        grid = grids.get(layer)
        if grid:
            shape = _shape(layer, tensors)
            weights += shape[0] * shape[1]
            bits += 8 * total
        else:
            shape = tensors[names[0]].shape
        layers.append(
            {
                "name": layer,
                "scheme": grid.scheme if grid else None,
                "group_size": grid.group_size if grid else None,
                "dtype": grid.format if grid else tensors[names[0]].dtype,
                "shape": list(shape),
                "bytes": total,
            }
        )
    return {
        "format": form.name if form else "dense",
        "family": anatomy.family,
        "layers": layers,
        "bits_per_weight": bits / weights if weights else None,
        "bytes": folder.bytes,
        "kv_cache": (quantization or {}).get("kv_cache_scheme"),
    }


def _shape(layer: str, tensors: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    """A quantized layer's [out, in]; packed codes keep it in a tensor of its own."""
    packed = tensors.get(f"{layer}.weight_shape")
    return tuple(read_tensor(packed).tolist()) if packed else tensors[f"{layer}.weight"].shape
