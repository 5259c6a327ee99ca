"""The adapter: low-rank products that are added to quantized weights, in a folder that PEFT and engines load as a LoRA.

    adapter/adapter_config.json          r = lora_alpha, so that products are added as they are
    adapter/adapter_model.safetensors    base_model.model.<layer>.lora_A.weight   BF16 [rank, in]
                                         base_model.model.<layer>.lora_B.weight   BF16 [out, rank]

PEFT's A is the factor that inputs meet first, so a layer computes `x Wᵀ + (x lora_Aᵀ) lora_Bᵀ`; our product A B is its
`lora_B lora_A`. `compress.load` and everything that scores a quantized folder add what they find there. transformers
does not look for it: `PeftModel.from_pretrained(model, folder / "adapter")`.

The file has its final size from the beginning and each tensor its place, so that a block's products are on disk as soon
as it is done, and no more than a block's are ever held. Where nothing was written there are zeros: no product.

Format: https://github.com/huggingface/peft, as of 0.21, and https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.manifest import write_atomically
from compress.errors import ModelError, writing
from compress.models.headers import file_bytes, read_json, tensor_bytes

ADAPTER = "adapter"
"""Its folder, inside that of the checkpoint."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."

FLOATS = ("BF16", "F16", "F32")

Product = tuple[int, int, int]
"""Sizes of a layer's product: out, rank, in."""
Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]
"""A and B."""

READABLE: dict[str, Collection[Any]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}
"""Key of a foreign config → the values that leave a product what it is."""


def adapter_layout(products: Mapping[str, Product]) -> Entries:
    """Tensor name → (safetensors dtype, shape) of the whole file, by arithmetic alone. `products`: by layer."""
    entries: Entries = {}
    for layer, (rows, rank, columns) in products.items():
        first, second = _names(layer)
        entries |= {first: ("BF16", (rank, columns)), second: ("BF16", (rows, rank))}
    return entries


def adapter_config(products: Mapping[str, Product], modules: Collection[str], *, causal: bool = True) -> dict[str, Any]:
    """What PEFT wants to know. `modules`: the path of every module of the model.

    Layers are targeted by the last part of their names where all modules of that name have a product, else by path.
    """
    (rank,) = {rank for _, rank, _ in products.values()}
    others = {_leaf(name) for name in modules if name not in products}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name if _leaf(name) in others else _leaf(name) for name in products}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def create_adapter(folder: Path, config: Mapping[str, Any], products: Mapping[str, Product]) -> None:
    """Write an adapter whose products are all zero: config, header, and room for every tensor."""
    entries = adapter_layout(products)
    header, _ = _header(entries)
    file = folder / WEIGHTS
    with writing(file):
        folder.mkdir(exist_ok=True)
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(file_bytes(entries))
            os.fsync(stream.fileno())
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def write_products(folder: Path, products: Mapping[str, Product], factors: Mapping[str, Factors]) -> None:
    """Put the bfloat16 factors of some layers into their places in a created adapter."""
    _, begins = _header(adapter_layout(products))
    file = folder / WEIGHTS
    with writing(file), file.open("r+b") as stream:
        for layer, (A, B) in factors.items():
            for name, factor in zip(_names(layer), (B, A), strict=True):
                stream.seek(begins[name])
                stream.write(factor.cpu().flatten().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Adapter:
    """What is to be added to a checkpoint's weights, each product read when it is asked for."""

    file: Path
    products: Mapping[str, Product] = field(default_factory=dict)
    """By layer; none where the folder has no adapter."""
    bytes: Mapping[str, int] = field(default_factory=dict)
    """Of each product on disk."""

    def read(self, layer: str) -> Factors:
        """A and B of one layer, in the type they are stored in."""
        with safe_open(self.file, "pt") as stored:
            B, A = (stored.get_tensor(name).clone() for name in _names(layer))  # or the file would stay mapped
        return A, B


def open_adapter(checkpoint: Path) -> Adapter:
    """The adapter inside a checkpoint's folder. Raises ModelError where one is there that cannot be added as it is."""
    folder = checkpoint / ADAPTER
    file = folder / WEIGHTS
    if not (folder / CONFIG).exists():
        return Adapter(file)
    _check_config(folder / CONFIG)
    try:
        with safe_open(file, "pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (it is no mapping)
            entries = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    layers = dict.fromkeys(name.removeprefix(ROOT).rpartition(".lora_")[0] for name in entries)
    products = {layer: _product(file, layer, entries) for layer in layers}
    for name in entries.keys() - adapter_layout(products).keys():
        raise ModelError(f"{file}: holds {name}, which is no factor of a layer's product")
    sizes = {layer: sum(tensor_bytes(*entries[name]) for name in _names(layer)) for layer in products}
    return Adapter(file, products, sizes)


def _check_config(file: Path) -> None:
    config = read_json(file)
    for key, readable in READABLE.items():
        if config.get(key) not in readable:
            choice = " or ".join(map(repr, readable))
            raise ModelError(f"{file}: {key} is {config.get(key)!r}, only {choice} can be read")
    if not config.get("r") or config["r"] != config.get("lora_alpha"):
        raise ModelError(
            f"{file}: r={config.get('r')} and lora_alpha={config.get('lora_alpha')} differ, and only products that are "
            "added as they are can be read. Scale lora_B by lora_alpha / r and set both to r"
        )


def _product(file: Path, layer: str, entries: Entries) -> Product:
    """The sizes of one layer's product. Raises ModelError where its factors do not make one."""
    first, second = (entries.get(name, ("", ())) for name in _names(layer))
    if len(first[1]) != 2 or len(second[1]) != 2 or first[1][0] != second[1][1]:
        raise ModelError(
            f"{file}: {layer} has lora_A {list(first[1])} and lora_B {list(second[1])}, expected [rank, in] and "
            "[out, rank]"
        )
    if not {first[0], second[0]} <= set(FLOATS):
        raise ModelError(f"{file}: {layer} has factors of {first[0]} and {second[0]}, expected {', '.join(FLOATS)}")
    return second[1][0], first[1][0], first[1][1]


def _header(entries: Entries) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file of tensors of one type, as the library writes it, and where each tensor begins."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in sorted(entries.items()):
        end = offset + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + table[name]["data_offsets"][0] for name in entries}


def _names(layer: str) -> tuple[str, str]:
    """What the file calls the factor that inputs meet first, and the other."""
    return f"{ROOT}{layer}.lora_A.weight", f"{ROOT}{layer}.lora_B.weight"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
