"""What a checkpoint holds, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint import format_of
from compress.core.scheme import Scheme
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
    schemes = form.schemes(quantization, tensors) if form and quantization else {}
    owners: dict[str, list[str]] = {}
    for name in tensors:
        owner = next((layer for layer in (name.rpartition(".")[0],) if layer in schemes), name.removesuffix(".weight"))
        owners.setdefault(owner, []).append(name)
    layers = []
    weights = bits = 0
    for layer, names in owners.items():
        total = sum(tensors[name].nbytes for name in names if not name.endswith(".bias"))
        scheme = schemes.get(layer)
        if scheme:
            shape = _shape(layer, tensors, scheme)
            weights += shape[0] * shape[1]
            bits += 8 * total
        else:
            shape = tensors[names[0]].shape
        layers.append(
            {
                "name": layer,
                "scheme": scheme.name if scheme else None,
                "group_size": scheme.weights.group_size if scheme else None,
                "dtype": scheme.weights.format if scheme else tensors[names[0]].dtype,
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


def _shape(layer: str, tensors: Mapping[str, TensorHeader], scheme: Scheme) -> tuple[int, ...]:
    """A quantized layer's [out, in]; a bit stream keeps it in a tensor of its own, FP4 codes are two to a byte."""
    if f"{layer}.weight_shape" in tensors:
        return tuple(read_tensor(tensors[f"{layer}.weight_shape"]).tolist())
    if f"{layer}.weight_packed" in tensors:
        rows, width = tensors[f"{layer}.weight_packed"].shape
        return rows, width * 8 // scheme.weights.bits
    return tensors[f"{layer}.weight"].shape
