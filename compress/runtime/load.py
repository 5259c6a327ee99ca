"""A checkpoint as a model that runs: quantized layers on `quant_kernels`, all else as transformers has it.

An ordinary folder is loaded by transformers itself. A compressed one starts as an empty transformers module on the
meta device; each quantized linear layer is replaced by a `QuantLinear`, each sparse one by a `SparseLinear`, and
every other tensor filled in, one at a time, so that loading needs the packed model and one layer, never the model in
floating point. Layers that the folder's adapter compensates keep that kernel, and add their low-rank product to what
it gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint.kv_cache import read_scales, scheme_of
from compress.checkpoint.weights import QuantizedWeights
from compress.core.qtensor import QuantizedTensor
from compress.errors import ModelError
from compress.models.headers import Folder, read_folder
from compress.models.store import DTYPES, LazyModel, load_tokenizer, local_folder
from compress.runtime.modules import Compensated, QuantLinear, put_in_place
from compress.runtime.normal import NormalLinear
from compress.runtime.sparse import SparseLinear


def load(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A transformers model with `generate()`, ready to run, and its tokenizer.

    `folder` is a local folder or a hub id. `dtype` is the type of the activations, by default the
    checkpoint's own; with float32 a quantized layer computes exactly `x · dequantize(W)ᵀ`. What config.json
    says about quantization is kept as `model.netsuke_quantization`, the scheme of its cache, if any, as
    `model.netsuke_kv_cache`, with its calibrated scales in `model.netsuke_kv_scales`: `compress.generate` honours them,
    `model.generate` takes `past_key_values=compress.quantized_cache(model)`. Raises ModelError where the folder cannot
    be read.
    """
    path = local_folder(str(folder))
    headers = read_folder(path)
    if headers.truncated:
        raise ModelError(headers.truncated[0])
    dtype = stored_dtype(headers) if dtype is None else dtype
    tokenizer = load_tokenizer(path)
    if "quantization_config" in headers.config:
        model = _load_quantized(headers, device, dtype)
    else:
        model = _load_plain(headers, device, dtype)
    return model.eval().requires_grad_(False), tokenizer


def stored_dtype(folder: Folder) -> torch.dtype:
    """The type a checkpoint says it computes in; where it does not, the type that most of its floats have."""
    named = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if named is not None:
        dtype = getattr(torch, str(named), None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(f"{folder.path / 'config.json'}: dtype {named!r} is no type that torch knows")
        return dtype
    sizes: Counter[str] = Counter()
    for header in folder.tensors.values():
        if header.dtype in ("F32", "F16", "BF16"):
            sizes[header.dtype] += header.nbytes
    return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32


def _load_plain(folder: Folder, device: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder.path}: transformers cannot load it: {error}") from error
    model.netsuke_kv_cache, model.netsuke_kv_scales = scheme_of(folder.config), {}
    return model.to(device)


def _load_quantized(folder: Folder, device: str, dtype: torch.dtype) -> nn.Module:
    weights = QuantizedWeights(folder)
    lazy = LazyModel(weights, dtype=dtype, device=device)
    model: Any = lazy.module
    modules = dict(model.named_modules())
    layers = [*weights.schemes, *weights.sparse]
    for name in layers:
        check_linear(modules.get(name), name, folder)
    pack_layers(model, weights, dict(zip(layers, layers, strict=True)), device=device, dtype=dtype)
    for name, _ in model.named_children():
        lazy.materialise(name)
    _tie(lazy)
    _fill_buffers(model, weights, device)
    _read_generation_config(model, folder)
    model.config.dtype = dtype
    remember(model, weights)
    return model


def pack_layers(
    model: nn.Module,
    weights: QuantizedWeights,
    places: Mapping[str, str],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> None:
    """Read quantized layers and put them where they belong. `places`: layer → its path in the model."""
    biased = {name for name, path in places.items() if model.get_submodule(path).bias is not None}
    for names in _launches(weights, [name for name in places if name in weights.schemes]):
        biases = [weights.read(f"{name}.bias") for name in names if name in biased]
        scheme = weights.schemes[names[0]]
        layer = (NormalLinear if scheme.weights.kind == "normal" else QuantLinear).from_quantized(
            _stacked([weights.quantized(name) for name in names]),
            torch.cat(biases) if biases else None,
            inputs=scheme.inputs,
            input_scale=weights.input_scale(names[0]),
            rotated=weights.online.get(names[0]),
            dtype=dtype,
            device=device,
        )
        put_in_place(model, [places[name] for name in names], layer)
    for name in [name for name in places if name in weights.sparse]:
        bias = weights.read(f"{name}.bias") if name in biased else None
        sparse = SparseLinear(weights.read(f"{name}.weight"), bias, dtype=dtype, device=device)
        model.set_submodule(places[name], sparse)
    for name in [name for name in places if name in weights.adapter.products]:
        A, B = (factor.to(device, dtype) for factor in weights.adapter.read(name))
        model.set_submodule(places[name], Compensated(model.get_submodule(places[name]), A, B))


def remember(model: Any, weights: QuantizedWeights) -> None:
    """Note on a model what its folder says of quantization, and of its cache."""
    config = weights.folder.config
    model.netsuke_quantization = config["quantization_config"]
    model.netsuke_kv_cache, model.netsuke_kv_scales = scheme_of(config), read_scales(weights)


def _launches(weights: QuantizedWeights, names: Iterable[str]) -> list[list[str]]:
    """These layers; those of a block that share input, scheme and having a bias stand together and run as one.

    Floats do not: rows of different layers have scales that cannot be stacked.
    """
    anatomy = weights.anatomy
    site_of = {local: number for number, site in enumerate(anatomy.sites) if site.fused for local in site.layers}
    launches: dict[Hashable, list[str]] = {}
    for name in names:
        scheme = weights.schemes[name]
        block, _, local = name.removeprefix(f"{anatomy.blocks}.").partition(".")
        shared = block, site_of.get(local), scheme, f"{name}.bias" in weights
        alone = local not in site_of or scheme.weights.kind == "float"
        launches.setdefault(name if alone else shared, []).append(name)
    return list(launches.values())


def _stacked(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """The rows of several weights on one grid as one weight."""
    if len(weights) == 1:
        return weights[0]
    zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return QuantizedTensor(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat(zero_points) if zero_points else None,
        weights[0].grid,
    )


def check_linear(module: nn.Module | None, name: str, folder: Folder) -> None:
    """Raises ModelError where a compressed weight belongs to no linear layer."""
    if not isinstance(module, nn.Linear):
        found = "has no such module" if module is None else f"has a {type(module).__name__} there"
        raise ModelError(f"{folder.path}: {name} is stored as a quantized linear layer, the model {found}")


def _tie(lazy: LazyModel) -> None:
    """Make tied parameters one object, so that moving the model does not pull them apart."""
    parameters = dict(lazy.module.named_parameters(remove_duplicate=False))
    for name, source in lazy.tied.items():
        if name in parameters and source in parameters:
            owner, _, leaf = name.rpartition(".")
            lazy.module.get_submodule(owner).register_parameter(leaf, parameters[source])


def _fill_buffers(model: nn.Module, weights: QuantizedWeights, device: str) -> None:
    """Buffers are real from the start; those that the checkpoint stores take their stored values."""
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        stored = weights.read(name).to(buffer.dtype) if name in weights.tensors else buffer
        setattr(model.get_submodule(owner), leaf, stored.to(device))


def _read_generation_config(model: Any, folder: Folder) -> None:
    from transformers import GenerationConfig

    if (folder.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
