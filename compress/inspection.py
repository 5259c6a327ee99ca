"""What a checkpoint holds, from its config and headers alone."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from compress.checkpoint import format_of, sparse_24
from compress.checkpoint.adapter import Adapter, open_adapter
from compress.checkpoint.gguf_file import PLAIN, GGUFFile
from compress.checkpoint.kv_cache import scheme_of
from compress.models import anatomy_for
from compress.models.headers import canonical, read_folder


def inspect(path: Path) -> dict[str, Any]:
    """What `netsuke inspect` prints of a folder or a GGUF file: format, layers with scheme, sparsity, rank, shape and
    bytes, bits per weight, KV cache."""
    if path.suffix == ".gguf" and path.is_file():
        return _inspect_file(path)
    folder = read_folder(path)
    config = folder.config
    anatomy = anatomy_for(config, folder.shapes)
    tensors = canonical(folder.tensors, anatomy)
    quantization = config.get("quantization_config")
    form = format_of(config) if quantization else None
    schemes = form.schemes(quantization, tensors) if form and quantization else {}
    sparse = sparse_24.sparse_layers(tensors) if form and form.name == sparse_24.NAME else frozenset()
    adapter = open_adapter(path) if quantization else Adapter(path)
    owners: dict[str, list[str]] = {}
    for name in tensors:
        stems = name.rpartition(".")[0], name.partition(".weight.")[0]
        owner = next((stem for stem in stems if stem in schemes or stem in sparse), name.removesuffix(".weight"))
        owners.setdefault(owner, []).append(name)
    layers = []
    weights = bits = 0
    for layer, names in owners.items():
        total = sum(tensors[name].nbytes for name in names if not name.endswith(".bias"))
        total += adapter.bytes.get(layer, 0)
        scheme = schemes.get(layer)
        stored = f"{layer}.compressed" if layer in sparse else names[0]
        if form and scheme:
            shape = form.shape(layer, tensors, scheme.weights)
            weights += shape[0] * shape[1]
            bits += 8 * total
        else:
            shape = sparse_24.shape(layer, tensors) if layer in sparse else tensors[names[0]].shape
        layers.append(
            {
                "name": layer,
                "scheme": scheme.name if scheme else None,
                "group_size": scheme.weights.group_size if scheme else None,
                "dtype": scheme.weights.format if scheme else tensors[stored].dtype,
                "sparsity": sparse_24.PATTERN.name if layer in sparse else None,
                "rank": adapter.products[layer][1] if layer in adapter.products else None,
                "shape": list(shape),
                "bytes": total,
            }
        )
    return {
        "format": form.name if form else "dense",
        "family": anatomy.family,
        "layers": layers,
        "bits_per_weight": bits / weights if weights else None,
        "bytes": folder.bytes + (adapter.file.stat().st_size if adapter.products else 0),
        "kv_cache": scheme_of(folder.config) or (quantization or {}).get("kv_cache_scheme"),
    }


def _inspect_file(path: Path) -> dict[str, Any]:
    file = GGUFFile(path)
    kinds = {name: file.block_type(name) for name in file.infos}
    blocks = [info for info in file.infos.values() if info.kind not in PLAIN]
    weights = sum(prod(info.shape) for info in blocks)
    layers = [
        {
            "name": info.name.removesuffix(".weight"),
            "scheme": None if info.kind in PLAIN else info.kind,
            "group_size": kind.part if (kind := kinds[info.name]) else None,
            "dtype": info.kind,
            "sparsity": None,
            "rank": None,
            "shape": list(info.shape),
            "bytes": info.nbytes,
        }
        for info in file.infos.values()
    ]
    return {
        "format": "gguf",
        "family": file.metadata.get("general.architecture"),
        "layers": layers,
        "bits_per_weight": 8 * sum(info.nbytes for info in blocks) / weights if weights else None,
        "bytes": path.stat().st_size,
        "kv_cache": None,
    }
