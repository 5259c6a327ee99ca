"""compressed-tensors: the checkpoint that vLLM, SGLang and transformers read.

A layer of shape [out, in] on an integer grid of b bits, its codes q and zero points z signed, is stored as

    pack-quantized   weight_packed      int32 [out, ceil(in·b/32)]      q + 2^(b-1), one bit stream per row
                     weight_scale       float [out, groups]             in the model's dtype
                     weight_shape       int64 [2]                       (out, in)
                     weight_zero_point  int32 [ceil(out·b/32), groups]  asymmetric: one bit stream per column
    int-quantized    weight             int8  [out, in]                 q, a byte each, whatever b is
                     weight_scale       float [out, groups]
                     weight_zero_point  int8  [out, groups]             asymmetric

where `groups` is 1 with one scale per channel. `config.json` says how layers are quantized, under
`quantization_config`: groups of layers, each with its targets and the arguments of its grid. A target is an
exact module name, else a pattern `re:…` matched from the start of the name, else a class name.

Layers on more than one grid are targeted by exact name, so that an engine which fuses layers cannot take
one for another. Where all layers share one asymmetric grid, the config also asks for `dequantize`:
transformers 5.23 expects packed zero points in the wrong shape unless it decompresses while loading. With
several grids the wish would do harm, for then it reads every layer on the first of them; there it is better
that loading fails.

Format: https://github.com/vllm-project/compressed-tensors, as of `VERSION`; 0.20 reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from compress.checkpoint.packing import num_words, pack, unpack
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import WEIGHT_BITS, Grid
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES

VERSION = "0.19.0"
FLOATS = ("F64", "F32", "F16", "BF16")

READABLE: dict[str, Collection[Any]] = {
    "type": ("int",),
    "num_bits": WEIGHT_BITS,
    "symmetric": (True, False),
    "strategy": ("group", "channel"),
    "dynamic": (None, False),
    "actorder": (None, False, "weight", "static"),
}
"""Argument of a foreign grid → the values that `Grid` has a word for."""

Compression = Literal["pack-quantized", "int-quantized"]


@dataclass(frozen=True)
class CompressedTensors:
    """Writes with the given compression; reads both."""

    compression: Compression = "pack-quantized"
    name: ClassVar[str] = "compressed-tensors"
    packs: ClassVar[bool] = True

    def problems(self, name: str, kind: str, shape: tuple[int, int], grid: Grid) -> list[str]:
        """What speaks against storing this layer, a sentence each; `kind` is the class of its module."""
        if kind != "Linear":
            return [
                f"{name} is a {kind}, and readers of compressed-tensors replace nn.Linear only. "
                "Use `checkpoint: {format: dense}`, or add the layer to `ignore`."
            ]
        return []

    def layout(
        self, name: str, shape: tuple[int, int], grid: Grid, scale_dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes, by arithmetic alone."""
        rows, columns = shape
        groups = grid.num_groups(columns)
        packed = self.compression == "pack-quantized"
        entries: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.weight_scale": (scale_dtype, (rows, groups))}
        if packed:
            entries[f"{name}.weight_packed"] = ("I32", (rows, num_words(columns, grid.bits)))
            entries[f"{name}.weight_shape"] = ("I64", (2,))
        else:
            entries[f"{name}.weight"] = ("I8", (rows, columns))
        if not grid.symmetric:
            height = num_words(rows, grid.bits) if packed else rows
            entries[f"{name}.weight_zero_point"] = ("I32" if packed else "I8", (height, groups))
        return entries

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors of one layer. Raises ValueError where a code is not on the grid."""
        bits = tensor.grid.bits
        entries = {f"{name}.weight_scale": tensor.scale.contiguous()}
        zero_point = tensor.zero_point
        if self.compression == "int-quantized":
            entries[f"{name}.weight"] = tensor.codes.contiguous()
        else:
            entries[f"{name}.weight_packed"] = pack(_unsigned(tensor.codes, bits), bits)
            entries[f"{name}.weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
            zero_point = None if zero_point is None else pack(_unsigned(zero_point.T, bits), bits).T
        if zero_point is not None:
            entries[f"{name}.weight_zero_point"] = zero_point.contiguous()
        return entries

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The layer that `encode` was given, in whichever compression it is stored.

        Raises ModelError where a tensor is missing, not wanted, or not what the grid makes of it.
        """
        _refuse_strays(name, tensors, grid)
        packed = f"{name}.weight_packed" in tensors
        shape = _stored_shape(name, tensors, packed)
        _check_stored(name, tensors, shape, grid, packed)
        scale = tensors[f"{name}.weight_scale"]
        zero_point = None if grid.symmetric else tensors[f"{name}.weight_zero_point"]
        if packed:
            rows, columns = shape
            codes = _signed(unpack(tensors[f"{name}.weight_packed"], grid.bits, columns), grid.bits)
            if zero_point is not None:
                zero_point = _signed(unpack(zero_point.T, grid.bits, rows), grid.bits).T.contiguous()
        else:
            codes = tensors[f"{name}.weight"]
            _check_codes(f"{name}.weight", codes, grid)
            if zero_point is not None:
                _check_codes(f"{name}.weight_zero_point", zero_point, grid)
        return QuantizedTensor(codes, scale, zero_point, grid)

    def quantization_config(self, grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
        """What config.json says of these layers; `ignored` names every nn.Linear that stays as it was."""
        layers: dict[Grid, list[str]] = {}
        for name, grid in grids.items():
            layers.setdefault(grid, []).append(name)
        config: dict[str, Any] = {
            "quant_method": self.name,
            "version": VERSION,
            "format": self.compression,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {
                    "targets": ["Linear"] if len(layers) == 1 else names,
                    "weights": _arguments(grid),
                    "input_activations": None,
                    "output_activations": None,
                    "format": self.compression,
                }
                for index, (grid, names) in enumerate(layers.items())
            },
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }
        if self.compression == "pack-quantized" and len(layers) == 1 and not next(iter(layers)).symmetric:
            config["dequantize"] = True
        return config

    def grids(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Grid]:
        """Layer → grid, from anyone's `quantization_config` and the headers of the files.

        A layer is quantized if it is stored so; `targets` only say how. Raises ModelError for what cannot be
        read as integer weights: float formats, quantized activations, sparse or rotated weights, columns in
        another order. The KV cache's scheme is not looked at.
        """
        _refuse_transforms(config)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise ModelError(f"quantization_config.config_groups: got {groups!r}, expected groups of layers")
        group_by_target = {target: key for key, group in groups.items() for target in _targets(key, group)}
        grid_by_group: dict[str, Grid] = {}
        grids = {}
        for name in _quantized_layers(tensors):
            key = group_by_target[_match(name, group_by_target)]
            if key not in grid_by_group:
                grid_by_group[key] = _grid(key, groups[key])
            grids[name] = grid_by_group[key]
            _refuse_strays(name, tensors, grids[name])
        return grids


def _unsigned(codes: Int8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows columns"]:
    return codes.view(torch.uint8) + (1 << bits - 1)


def _signed(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int8[Tensor, "rows columns"]:
    return (codes - (1 << bits - 1)).view(torch.int8)


def _stored_shape(name: str, tensors: Mapping[str, Tensor], packed: bool) -> tuple[int, int]:
    key = f"{name}.weight_shape" if packed else f"{name}.weight"
    stored = tensors.get(key)
    if stored is None:
        raise ModelError(f"{key}: is missing, so the shape of {name} is unknown")
    shape = stored.flatten().tolist() if packed else list(stored.shape)
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"{key}: says {name} has shape {shape}, expected two sizes, out and in")
    return shape[0], shape[1]


def _check_stored(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid, packed: bool) -> None:
    """Raises ModelError unless every tensor of the layer is there with the shape and dtype it must have."""
    compression: Compression = "pack-quantized" if packed else "int-quantized"
    try:
        layout = CompressedTensors(compression).layout(name, shape, grid, "F32")
    except ValueError as error:
        raise ModelError(f"{name}: {error}, as the config says") from None
    layout.pop(f"{name}.weight_shape", None)
    for key, (dtype, expected) in layout.items():
        allowed = [DTYPES[dtype] for dtype in (FLOATS if key.endswith("scale") else (dtype,))]
        described = f"{list(expected)} of {' or '.join(map(str, allowed))}"
        stored = tensors.get(key)
        if stored is None:
            raise ModelError(f"{key}: is missing, expected {described} for {grid}")
        if tuple(stored.shape) != expected or stored.dtype not in allowed:
            got = f"{list(stored.shape)} of {stored.dtype}"
            raise ModelError(f"{key}: is {got}, expected {described} for {grid}")


def _check_codes(key: str, codes: Tensor, grid: Grid) -> None:
    low, high = (int(extreme) for extreme in codes.aminmax())
    if low < grid.qmin or high > grid.qmax:
        raise ModelError(f"{key}: holds {low} … {high}, expected {grid.qmin} … {grid.qmax} for {grid}")


def _arguments(grid: Grid) -> dict[str, Any]:
    """The arguments of one grid. Readers refuse a key they do not know, so there is none to spare."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
    }


def _grid(key: str, group: Any) -> Grid:
    """The inverse of `_arguments` for a config group called `key`, or the preset of that name."""
    where = f"quantization_config.config_groups.{key}"
    if isinstance(group, list):
        preset = re.fullmatch(r"W([2-8])A16(_ASYM)?", key.upper())
        if not preset:
            raise ModelError(f"{where}: is no preset that can be read; there are W2A16 … W8A16 and W2A16_ASYM …")
        return Grid(int(preset[1]), symmetric=not preset[2], group_size=128)
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise ModelError(f"{where}.{part}: quantized activations cannot be read, only weights")
    if not isinstance(group.get("weights"), Mapping):
        raise ModelError(f"{where}.weights: got {group.get('weights')!r}, expected the arguments of a grid")
    weights = {"type": "int", "num_bits": 8, "symmetric": True, "group_size": None, **group["weights"]}
    size = weights["group_size"]
    if not weights.get("strategy"):
        weights["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    for argument, readable in READABLE.items():
        if weights.get(argument) not in readable:
            raise ModelError(
                f"{where}.weights.{argument}: {weights.get(argument)!r} cannot be read "
                f"(format {group.get('format')!r}), only {', '.join(map(repr, readable))}"
            )
    if weights["strategy"] == "channel":
        size = None
    elif not isinstance(size, int) or size < 1:
        raise ModelError(f"{where}.weights.group_size: got {size!r}, expected a positive number of columns")
    return Grid(weights["num_bits"], weights["symmetric"], size)


def _targets(key: str, group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, Mapping) else group
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError(f"quantization_config.config_groups.{key}: targets are {targets!r}, expected names")
    return targets


def _match(name: str, targets: Collection[str]) -> str:
    """The target that decides for a layer: its own name before a pattern before its class."""
    if name in targets:
        return name
    for target in sorted(target for target in targets if target.startswith("re:")):
        if re.match(target.removeprefix("re:"), name):
            return target
    if "Linear" in targets:
        return "Linear"
    raise ModelError(f"{name}: is stored quantized, but no config group targets it: {sorted(targets)}")


def _quantized_layers(tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    for key, header in tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and header.dtype not in FLOATS):
            yield name


def _refuse_strays(name: str, stored: Container[str], grid: Grid) -> None:
    """Raises ModelError for a tensor that would change what the codes stand for."""
    strays = ("weight_g_idx", "weight_global_scale", *(("weight_zero_point",) if grid.symmetric else ()))
    for stray in strays:
        if f"{name}.{stray}" in stored:
            raise ModelError(f"{name}.{stray}: has no meaning for {grid}, so this layer cannot be read")


def _refuse_transforms(config: Mapping[str, Any]) -> None:
    sparsity, transform = config.get("sparsity_config") or {}, config.get("transform_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ModelError(f"quantization_config.sparsity_config: {sparsity['format']!r} cannot be read")
    if transform.get("config_groups"):
        raise ModelError("quantization_config.transform_config: rotated weights cannot be read")
