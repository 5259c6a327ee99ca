"""torchao in safetensors, which transformers reads with the package torchao: weights of 2 to 8 bits, and FP8.

    _weight_qdata       int8 [out, in], whatever the bits; FP8: float8_e4m3fn
    _weight_scale       [out, groups]
    _weight_zero_point  int8 [out, groups], zero where the grid is symmetric; only of the second kind below

torchao keeps its tensors as classes of Python. Which class a weight is, and with what attributes, stands as JSON in the
header of the file, under the weight's name, and `tensor_names` lists all names. Readers gather the headers of all files
into one, so each file tells of the whole folder. `config.json` has the configuration that would have made such weights,
with a version of its own.

    w8a16, one scale per channel   Int8Tensor                Int8WeightOnlyConfig    version 2
    other integers                 IntxUnpackedToInt8Tensor  IntxWeightOnlyConfig    version 2
    fp8a16                         Float8Tensor              Float8WeightOnlyConfig  version 2

A code takes a byte whatever its bits. torchao stores the scales of the first and the last as float32 and multiplies in
the type of the activations; ours are bfloat16 numbers, which lose nothing by either.

Classes and versions are torchao's to change, and it has done so. What is written here is what 0.18 writes, without the
words that have a default there and that earlier versions do not know: 0.16, 0.17 and 0.18 read all of it alike.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.plain import Plain
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import FP8, WEIGHT_BITS, Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES

INT8 = Grid(8)
CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
SCALE_DTYPE = torch.bfloat16
"""Of the grids whose scales torchao keeps in float32."""


@dataclass(frozen=True)
class TorchAO(Plain):
    """The format, as torchao 0.18 reads it."""

    name: ClassVar[str] = "torchao"
    packs: ClassVar[bool] = True

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """What speaks against storing this layer, a sentence each; `kind` is the class of its module."""
        if kind != "Linear":
            return [f"{name} is a {kind}, and torchao holds nn.Linear only. Use dense, or add the layer to `ignore`"]
        if scheme.inputs:
            return [
                f"{name}: torchao rounds inputs by a rule of its own, and {scheme.name} would not be what it computes. "
                "Use a scheme that ends in a16, or compressed-tensors"
            ]
        if scheme.weights.kind != "int" and scheme.weights != FP8:
            return [f"{name}: torchao holds integers of 2 to 8 bits and fp8a16, and not {scheme.name}"]
        return []

    def scale_dtype(self, schemes: Collection[Scheme]) -> torch.dtype | None:
        """bfloat16 for int8 per channel and FP8; the type of each weight for the others."""
        return SCALE_DTYPE if any(_is_wide(scheme.weights) for scheme in schemes) else None

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes, by arithmetic alone."""
        grid = scheme.weights
        groups = grid.scale_shape(*shape)
        entries: Entries = {
            f"{name}.{CODES}": ("F8_E4M3" if grid.kind == "float" else "I8", shape),
            f"{name}.{SCALE}": ("F32" if _is_wide(grid) else scale_dtype, groups),
        }
        return entries if _is_wide(grid) else entries | {f"{name}.{ZERO}": ("I8", groups)}

    def metadata(self, entries: Entries, schemes: Collection[Scheme], dtype: str) -> dict[str, str]:
        """What the header of each file says of every weight of the folder."""
        words: dict[str, dict[str, Any]] = {}
        for key, (_, shape) in entries.items():
            layer, _, leaf = key.rpartition(".")
            if leaf == CODES:
                (grid,) = {scheme.weights for scheme in schemes}
                words[f"{layer}.weight"] = _tensor_words(grid, shape[-1], dtype)
            elif leaf not in (SCALE, ZERO):
                words[key] = {"_type": "Tensor"}
        return {"tensor_names": json.dumps([*words]), **{name: json.dumps(each) for name, each in words.items()}}

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors of one layer."""
        scale, zero = tensor.scale, tensor.zero_point
        stored = {
            f"{name}.{CODES}": tensor.codes.contiguous(),
            f"{name}.{SCALE}": (scale.float() if _is_wide(tensor.grid) else scale).contiguous(),
        }
        if not _is_wide(tensor.grid):
            stored[f"{name}.{ZERO}"] = torch.zeros(scale.shape, dtype=torch.int8) if zero is None else zero.contiguous()
        return stored

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """What `encode` was given, and what anyone stored: scales that bfloat16 does not hold are float32.

        Raises ModelError where a tensor is missing or does not fit the grid.
        """
        codes = tensors.get(f"{name}.{CODES}")
        if codes is None or codes.dim() != 2:
            raise ModelError(f"{name}.{CODES}: {'is missing' if codes is None else 'is no matrix'}")
        rows, columns = codes.shape
        try:
            entries = self.layout(name, (rows, columns), Scheme(grid), "F32")
        except ValueError as error:
            raise ModelError(f"{name}: {error}, as the config says") from None
        for key, (dtype, shape) in entries.items():
            found = tensors.get(key)
            if found is None:
                raise ModelError(f"{key}: is missing")
            fits = found.is_floating_point() if key.endswith(SCALE) else found.dtype == DTYPES[dtype]
            if tuple(found.shape) != shape or not fits:
                raise ModelError(f"{key}: is {list(found.shape)} of {found.dtype}, expected {list(shape)} of {dtype}")
        if grid.kind == "int" and (codes.min() < grid.qmin or codes.max() > grid.qmax):
            raise ModelError(f"{name}.{CODES}: holds {codes.min()} … {codes.max()}, which is not on {grid}")
        scale, zero = tensors[f"{name}.{SCALE}"], tensors.get(f"{name}.{ZERO}")
        if _is_wide(grid) and torch.equal(scale.to(SCALE_DTYPE).float(), scale.float()):
            scale = scale.to(SCALE_DTYPE)
        if zero is not None and grid.symmetric:
            if zero.any():
                raise ModelError(f"{name}.{ZERO}: are not all 0, though the config says the grid is symmetric")
            zero = None
        return QuantizedTensor(codes, scale, zero, grid)

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """A layer's [out, in]."""
        return tensors[f"{name}.{CODES}"].shape

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What config.json says: the configuration that would have made these layers, and the layers it passes over."""
        grid = next(iter(schemes.values())).weights
        return {
            "quant_method": self.name,
            "quant_type": {"default": _configuration(grid)},
            "modules_to_not_convert": list(ignored),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """Layer → scheme, from anyone's config. Raises ModelError for configurations of another kind."""
        scheme = Scheme(_grid((config.get("quant_type") or {}).get("default") or {}))
        return {key.removesuffix(f".{CODES}"): scheme for key in tensors if key.endswith(f".{CODES}")}


def weights_alone(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` of torchao is one that is read here."""
    try:
        TorchAO().schemes(config, {})
    except ModelError:
        return False
    return True


def _is_wide(grid: Grid) -> bool:
    """Whether torchao keeps the scales of this grid in float32."""
    return grid in (INT8, FP8)


def _tensor_words(grid: Grid, columns: int, dtype: str) -> dict[str, Any]:
    """The class of a weight and its attributes. `dtype`: what it stands for, in the words of safetensors."""
    data: dict[str, Any] = {"block_size": [1, grid.group_size or columns], "dtype": _dtype(DTYPES[dtype])}
    if _is_wide(grid):
        kind = "Int8Tensor" if grid == INT8 else "Float8Tensor"
        return {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    data |= {"target_dtype": _enum("torch.dtype", f"int{grid.bits}"), "activation_quantization": None}
    names = ["qdata", "scale", "zero_point"]
    return {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names}


def _configuration(grid: Grid) -> dict[str, Any]:
    if grid == INT8:
        per_row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
        return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": per_row}}
    if grid == FP8:
        data: dict[str, Any] = {"weight_dtype": _dtype(torch.float8_e4m3fn)}
        return {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": data}
    per_axis = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    per_group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": grid.group_size}}
    data = {
        "weight_dtype": _enum("torch.dtype", f"int{grid.bits}"),
        "granularity": per_group if grid.group_size else per_axis,
        "mapping_type": _enum("MappingType", "SYMMETRIC" if grid.symmetric else "ASYMMETRIC"),
        "scale_dtype": None,
        "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def _grid(configuration: Mapping[str, Any]) -> Grid:
    """The inverse of `_configuration`, for anyone's. Raises ModelError for what `Grid` has no word for."""
    data = configuration.get("_data") or {}
    told = {key: value.get("_data") if isinstance(value, Mapping) else value for key, value in data.items()}
    granularity = data.get("granularity") or {}
    kind, per = configuration.get("_type"), granularity.get("_type", "PerRow")
    size = (granularity.get("_data") or {}).get("group_size") if per == "PerGroup" else None
    bits = str(told.get("weight_dtype")).removeprefix("int")
    rows_alone = per in ("PerRow", "PerAxis") or (per == "PerGroup" and isinstance(size, int) and size > 0)
    if configuration.get("_version") == 2 and rows_alone:
        if kind == "Int8WeightOnlyConfig":
            return Grid(8, True, size)
        if kind == "IntxWeightOnlyConfig" and bits.isdecimal() and int(bits) in WEIGHT_BITS:
            return Grid(int(bits), told.get("mapping_type") != "ASYMMETRIC", size)
        if kind == "Float8WeightOnlyConfig" and told.get("weight_dtype") == "float8_e4m3fn" and size is None:
            return FP8
    raise ModelError(
        f"quantization_config.quant_type: {kind} version {configuration.get('_version')}, {per}, "
        f"{told.get('weight_dtype')}; of torchao only weights alone can be read, int2 … int8 or float8_e4m3fn, by row "
        "or group, in version 2 of their configurations"
    )


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return _enum("torch.dtype", str(dtype).removeprefix("torch."))


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}
