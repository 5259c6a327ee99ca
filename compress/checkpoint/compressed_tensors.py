"""compressed-tensors: the checkpoint that vLLM, SGLang and transformers read.

How a layer lies on disk is `compress.checkpoint.layouts`. `config.json` says how layers are quantized, under
`quantization_config`: groups of layers, each with its targets, its layout, and the arguments of the grids of weights
and inputs. A target is an exact module name, else a pattern `re:…` matched from the start of the name, else a class
name. Where calibration has fixed the scale of a layer's inputs, it is beside the weight: `input_scale`, or, where
groups have scales of their own as well, `input_global_scale`.

Layers of more than one scheme are targeted by exact name, so that an engine which fuses layers cannot take one for
another. Where all layers share one asymmetric grid, the config also asks for `dequantize`: transformers 5.23 expects
packed zero points in the wrong shape unless it decompresses while loading. With several grids the wish would do harm,
for then it reads every layer on the first of them; there it is better that loading fails.

Format: https://github.com/vllm-project/compressed-tensors, as of `VERSION`; 0.20 reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from compress.checkpoint.layouts import LAYOUTS, Entries, Layout, layout_for
from compress.checkpoint.plain import Plain
from compress.checkpoint.rotations import rotated_inputs, transform_config
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import INPUT_BITS, WEIGHT_BITS, Grid, Scheme, parse_scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES, read_tensor

VERSION = "0.19.0"
FLOATS = ("F64", "F32", "F16", "BF16")

READABLE: dict[str, Collection[Any]] = {
    "type": ("int", "float"),
    "symmetric": (True, False),
    "actorder": (None, False, "weight", "static"),
}
"""Argument of a foreign grid → the values that `Grid` has a word for."""

Compression = Literal["auto", "pack-quantized", "int-quantized"]


@dataclass(frozen=True)
class CompressedTensors(Plain):
    """Writes integers with the given compression, else every scheme the way engines expect it; reads all."""

    compression: Compression = "auto"
    name: ClassVar[str] = "compressed-tensors"
    packs: ClassVar[bool] = True

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """What speaks against storing this layer, a sentence each; `kind` is the class of its module."""
        if kind != "Linear":
            return [
                f"{name} is a {kind}, and readers of compressed-tensors replace nn.Linear only. "
                "Use `checkpoint: {format: dense}`, or add the layer to `ignore`."
            ]
        if scheme.weights.kind == "normal":
            return [f"{name}: compressed-tensors has no {scheme.name}. Use `checkpoint: {{format: bitsandbytes}}`."]
        if self.compression != "auto" and scheme.weights.kind != "int":
            return [f"{name}: {scheme.name} cannot be stored {self.compression}. Leave `compression` out."]
        if scheme.inputs and not scheme.weights.symmetric and self._layout(scheme) == "pack-quantized":
            return [
                f"{name}: transformers reads packed zero points only by dequantizing, and then no longer rounds inputs "
                f"as {scheme.name} has it. Use `symmetric: true`, or `checkpoint: {{compression: int-quantized}}`."
            ]
        return []

    def scale_dtype(self, schemes: Collection[Scheme]) -> None:
        """None: scales are stored in the type of the weight."""

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes, by arithmetic alone."""
        entries = LAYOUTS[self._layout(scheme)].entries(shape, scheme.weights, scale_dtype)
        if scheme.static:
            entries[_input_scale(scheme)] = ("F32" if scheme.local else scale_dtype), (1,)
        return {f"{name}.{leaf}": entry for leaf, entry in entries.items()}

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors of one layer. Raises ValueError where a code is not on the grid."""
        scheme = Scheme(tensor.grid, inputs)
        stored = LAYOUTS[self._layout(scheme)].encode(tensor)
        if input_scale is not None:
            stored[_input_scale(scheme)] = input_scale
        return {f"{name}.{leaf}": value for leaf, value in stored.items()}

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The weight that `encode` was given, in whichever layout it is stored.

        Raises ModelError where a tensor is missing, not wanted, or not what the grid makes of it.
        """
        _refuse_strays(name, tensors, grid)
        stored = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
        packed = "weight_packed" in stored
        layout = LAYOUTS[layout_for(Scheme(grid))]
        if grid.kind == "int":
            layout = LAYOUTS["pack-quantized" if packed else "int-quantized"]
        shape = _stored_shape(name, stored, grid)
        _check_stored(name, stored, shape, grid, layout)
        if grid.kind == "int" and not packed:
            for leaf in ("weight", *(() if grid.symmetric else ("weight_zero_point",))):
                _check_codes(f"{name}.{leaf}", stored[leaf], grid)
        return layout.decode(stored, shape, grid)

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """A layer's [out, in]; a bit stream keeps it in a tensor of its own, FP4 codes are two to a byte."""
        if f"{name}.weight_shape" in tensors:
            return tuple(read_tensor(tensors[f"{name}.weight_shape"]).tolist())
        if f"{name}.weight_packed" in tensors:
            rows, width = tensors[f"{name}.weight_packed"].shape
            return rows, width * 8 // grid.bits
        return tensors[f"{name}.weight"].shape

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What config.json says of these layers; `ignored` names every nn.Linear that stays as it was."""
        layers: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            layers.setdefault(scheme, []).append(name)
        layouts = [self._layout(scheme) for scheme in layers]
        config: dict[str, Any] = {
            "quant_method": self.name,
            "version": VERSION,
            "format": (layouts[0] if len(set(layouts)) == 1 else "mixed-precision") if layouts else "dense",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {
                    "targets": ["Linear"] if len(layers) == 1 else names,
                    "weights": _arguments(scheme.weights),
                    "input_activations": _arguments(scheme.inputs, inputs=True) if scheme.inputs else None,
                    "output_activations": None,
                    "format": layouts[index],
                }
                for index, (scheme, names) in enumerate(layers.items())
            },
            "ignore": list(ignored) if layers else [],
            "kv_cache_scheme": None,
        }
        if layouts == ["pack-quantized"] and not next(iter(layers)).weights.symmetric:
            config["dequantize"] = True
        if rotated:
            config["transform_config"] = transform_config(rotated)
        return config

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """Layer → scheme, from anyone's `quantization_config` and the headers of the files.

        A layer is quantized if it is stored so; `targets` only say how. Raises ModelError for what cannot be read:
        quantized outputs, sparse weights, columns in another order, grids that `Grid` has no word for. The
        KV cache's scheme is not looked at.
        """
        _refuse_sparsity(config)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise ModelError(f"quantization_config.config_groups: got {groups!r}, expected groups of layers")
        group_by_target = {target: key for key, group in groups.items() for target in _targets(key, group)}
        scheme_by_group: dict[str, Scheme] = {}
        schemes = {}
        for name in _quantized_layers(tensors):
            key = group_by_target[_match(name, group_by_target)]
            if key not in scheme_by_group:
                scheme_by_group[key] = _scheme(key, groups[key])
            schemes[name] = scheme_by_group[key]
            _refuse_strays(name, tensors, schemes[name].weights)
        return schemes

    def rotated_inputs(self, config: Mapping[str, Any], layers: Collection[str]) -> dict[str, int]:
        """Layer → size of the Hadamard matrix that its inputs are rotated by while the model runs."""
        return rotated_inputs(config.get("transform_config") or {}, layers)

    def input_scale(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        """The scale of a layer's inputs that is stored beside it. Raises ModelError where it is missing."""
        if not scheme.static:
            return None
        key = f"{name}.{_input_scale(scheme)}"
        if key not in tensors:
            raise ModelError(f"{key}: is missing, and {scheme.name} needs it")
        return tensors[key]

    def _layout(self, scheme: Scheme) -> str:
        return layout_for(scheme) if self.compression == "auto" else self.compression


def _input_scale(scheme: Scheme) -> str:
    return "input_global_scale" if scheme.local else "input_scale"


def _stored_shape(name: str, stored: Mapping[str, Tensor], grid: Grid) -> tuple[int, int]:
    """[out, in] of a layer, from the tensor that says so."""
    says = next((leaf for leaf in ("weight_shape", "weight", "weight_packed") if leaf in stored), None)
    if says is None or (says == "weight_packed" and grid.kind == "int"):
        missing = "weight_shape" if says else "weight"
        raise ModelError(f"{name}.{missing}: is missing, so the shape of {name} is unknown")
    shape = stored[says].flatten().tolist() if says == "weight_shape" else list(stored[says].shape)
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"{name}.{says}: says {name} has shape {shape}, expected two sizes, out and in")
    return shape[0], shape[1] * (2 if says == "weight_packed" else 1)


def _check_stored(name: str, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid, layout: Layout) -> None:
    """Raises ModelError unless every tensor of the layer is there with the shape and dtype it must have."""
    try:
        entries = layout.entries(shape, grid, "F32")
    except ValueError as error:
        raise ModelError(f"{name}: {error}, as the config says") from None
    entries.pop("weight_shape", None)
    for leaf, (dtype, expected) in entries.items():
        allowed = [DTYPES[dtype] for dtype in (FLOATS if dtype == "F32" else (dtype,))]
        described = f"{list(expected)} of {' or '.join(map(str, allowed))}"
        tensor = stored.get(leaf)
        if tensor is None:
            raise ModelError(f"{name}.{leaf}: is missing, expected {described} for {grid}")
        if tuple(tensor.shape) != expected or tensor.dtype not in allowed:
            got = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ModelError(f"{name}.{leaf}: is {got}, expected {described} for {grid}")


def _check_codes(key: str, codes: Tensor, grid: Grid) -> None:
    low, high = (int(extreme) for extreme in codes.aminmax())
    if low < grid.qmin or high > grid.qmax:
        raise ModelError(f"{key}: holds {low} … {high}, expected {grid.qmin} … {grid.qmax} for {grid}")


def _arguments(grid: Grid, inputs: bool = False) -> dict[str, Any]:
    """The arguments of one grid. Readers refuse a key they do not know, so there is none to spare."""
    arguments: dict[str, Any] = {"num_bits": grid.bits, "type": grid.kind, "symmetric": grid.symmetric}
    if grid.rows is None:
        return arguments | {"strategy": "tensor", "dynamic": False}
    if grid.scale == "e4m3":
        scales = {"strategy": "tensor_group", "group_size": grid.group_size, "scale_dtype": "torch.float8_e4m3fn"}
        return arguments | scales | {"dynamic": "local" if inputs else False}
    arguments["dynamic"] = inputs
    if grid.scale == "e8m0":
        return arguments | {"strategy": "group", "group_size": grid.group_size, "scale_dtype": "torch.uint8"}
    if grid.rows != 1:
        return arguments | {"strategy": "block", "block_structure": [grid.rows, grid.group_size]}
    whole = "token" if inputs else "channel"
    return arguments | {"strategy": "group" if grid.group_size else whole, "group_size": grid.group_size}


def _scheme(key: str, group: Any) -> Scheme:
    """The inverse of `_arguments` for a config group called `key`, or the preset of that name."""
    where = f"quantization_config.config_groups.{key}"
    if isinstance(group, list):
        return _preset(where, key)
    if group.get("output_activations"):
        raise ModelError(f"{where}.output_activations: quantized outputs cannot be read, only weights and inputs")
    if not isinstance(group.get("weights"), Mapping):
        raise ModelError(f"{where}.weights: got {group.get('weights')!r}, expected the arguments of a grid")
    inputs = group.get("input_activations")
    return Scheme(
        _grid(f"{where}.weights", group["weights"], group.get("format")),
        _grid(f"{where}.input_activations", inputs, group.get("format"), inputs=True) if inputs else None,
    )


PRESETS = {
    "FP8": "fp8-static", "FP8_DYNAMIC": "fp8", "FP8_BLOCK": "fp8-block", "NVFP4": "nvfp4", "NVFP4A16": "nvfp4a16",
    "MXFP4": "mxfp4", "MXFP4A16": "mxfp4a16", "INT8": "w8a8",
}  # fmt: skip


def _preset(where: str, key: str) -> Scheme:
    name = key.upper()
    integers = re.fullmatch(r"(W[2-8]A(?:16|8|4))(_ASYM)?", name)
    if name in PRESETS:
        return parse_scheme(PRESETS[name])
    if not integers:
        known = ", ".join(["W2A16 … W8A16", "W2A16_ASYM …", "W2A8 …", "W2A4 …", *PRESETS])
        raise ModelError(f"{where}: is no preset that can be read; there are {known}")
    return parse_scheme(integers[1].lower(), symmetric=not integers[2])


def _grid(where: str, given: Mapping[str, Any], layout: Any, inputs: bool = False) -> Grid:
    arguments = {"type": "int", "num_bits": 8, "symmetric": True, "group_size": None, "dynamic": False, **given}
    size, bits, kind = arguments["group_size"], arguments["num_bits"], arguments["type"]
    whole = "token" if inputs and arguments["dynamic"] else "tensor"
    inferred = whole if size is None else "channel" if size == -1 else "group"
    strategy = arguments.get("strategy") or inferred

    def refuse(argument: str, value: Any, readable: Collection[Any]) -> ModelError:
        choice = ", ".join(map(repr, readable))
        return ModelError(f"{where}.{argument}: {value!r} cannot be read (format {layout!r}), only {choice}")

    for argument, readable in READABLE.items():
        if arguments.get(argument) not in readable:
            raise refuse(argument, arguments.get(argument), readable)
    floats, integers = (4, 8), INPUT_BITS if inputs else WEIGHT_BITS
    if bits not in (floats if kind == "float" else integers):
        raise refuse("num_bits", bits, floats if kind == "float" else integers)
    strategies = _strategies(kind, bits, inputs)
    if strategy not in strategies:
        raise refuse("strategy", strategy, strategies)
    if (arguments["dynamic"] or False) != strategies[strategy]:
        raise refuse("dynamic", arguments["dynamic"], (strategies[strategy],))
    if strategy in {"group", "tensor_group"} and (not isinstance(size, int) or size < 1):
        raise ModelError(f"{where}.group_size: got {size!r}, expected a positive number of columns")
    if strategy == "block":
        rows, size = arguments.get("block_structure") or (None, None)
        return Grid(bits, True, size, "float", rows=rows)
    scale: Literal["float", "e4m3", "e8m0"] = "float"
    if kind == "float" and bits == 4:
        scale = "e4m3" if strategy == "tensor_group" else "e8m0"
    grouped = size if strategy in {"group", "tensor_group"} else None
    return Grid(bits, arguments["symmetric"], grouped, kind, scale, rows=None if strategy == "tensor" else 1)


def _strategies(kind: str, bits: int, inputs: bool) -> dict[str, Any]:
    """Granularities that can be read, each with whether its scales follow the data."""
    if kind == "float" and bits == 4:
        return {"tensor_group": "local" if inputs else False, "group": inputs}
    if inputs:
        return {"token": True, "tensor": False, **({"group": True} if kind == "float" else {})}
    return dict.fromkeys(("tensor", "channel", "block") if kind == "float" else ("group", "channel"), False)


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
    strays = ["weight_g_idx"]
    strays += ["weight_zero_point"] if grid.symmetric and grid.kind == "int" else []
    strays += ["weight_global_scale"] if grid.scale != "e4m3" else []
    for stray in strays:
        if f"{name}.{stray}" in stored:
            raise ModelError(f"{name}.{stray}: has no meaning for {grid}, so this layer cannot be read")


def _refuse_sparsity(config: Mapping[str, Any]) -> None:
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ModelError(f"quantization_config.sparsity_config: {sparsity['format']!r} cannot be read")
