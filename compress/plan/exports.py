"""Further formats of one run: `checkpoint: {format: compressed-tensors, also: [gptq, gguf-q4_0]}`.

The finished folder is converted as `netsuke convert` does it, into folders beside it that are called after it and the
format: `small.gptq` beside `small`; for llama.cpp a file, `small.q4_0.gguf`. What a format cannot hold is an error of
the plan, as far as headers tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import FORMATS, Format, format_for, sparse_24
from compress.checkpoint.gguf import kind_named
from compress.checkpoint.gguf_metadata import architecture_of
from compress.checkpoint.graphs import GRAPHS, require
from compress.checkpoint.onnx_blocks import problem as no_operands
from compress.core.ggml import type_for, type_of_grid, types_said
from compress.core.scheme import Scheme
from compress.errors import ModelError, OutputError
from compress.models.selection import LayerName, did_you_mean
from compress.models.store import DTYPES
from compress.plan import lint, target
from compress.plan.layers import LayerPlan
from compress.recipe import CheckpointOptions, Recipe, Target


def place(output: Path, name: str) -> Path:
    """Where a further format of the folder `output` lies."""
    kind = name.removeprefix("gguf-")
    return output.with_name(f"{output.name}.{name}" if kind == name else f"{output.name}.{kind}.gguf")


def check(recipe: Recipe, output: Path, model: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError where a further format cannot be written.

    A run that is resumed has been checked when it began: what is there now is its own.
    """
    for index, name in enumerate(recipe.checkpoint.also):
        where, there = recipe.where("checkpoint", "also", index), place(output, name)
        if there.resolve() == model.resolve():
            raise OutputError(f"{there}: is the model's own folder, and {name} would be written there. Rename one")
        if there.exists() and not (resume or overwrite):
            raise OutputError(f"{there}: exists already, and {where} asks for {name} there. Move it, or --overwrite")
        if name in GRAPHS:
            require(name)


def problems(
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    layers: Sequence[LayerName],
    form: Format,
    dtype: str,
    config: Mapping[str, Any],
) -> list[str]:
    """Why the result cannot be in these formats too, a sentence each.

    `form`: of the run; `dtype`: of the original weights, in the words of safetensors.
    """
    found: list[str] = []
    for index, name in enumerate(recipe.checkpoint.also):
        where = recipe.where("checkpoint", "also", index)
        reason = _at_odds(recipe, index, config) or _beside(recipe, name)
        if reason is None and name in GRAPHS:
            reason = next(
                filter(None, (no_operands(each, shapes[each], scheme) for each, scheme in schemes.items())), None
            )
        elif reason is None and name in FORMATS:
            other = format_for(CheckpointOptions(format=name))
            reason = next(_unheld(schemes, shapes, layers, form, other, dtype), None)
            several = {str(scheme): scheme for scheme in schemes.values()}
            found += [] if reason else lint.readers(recipe, several, other)
        found += [f"{where}: {reason}"] if reason else []
    return found


def engines(
    recipe: Recipe, schemes: Mapping[str, Scheme], form: Format, config: Mapping[str, Any], *, mixture: bool
) -> list[str]:
    """What else runs such a folder, as far as is known here. `mixture`: whether the model is one of experts."""
    stages = tuple(stage for stage in recipe.stages if stage.role != "cache")  # others pass over what they cannot keep

    def hinders(engine: Any) -> bool:
        asked = replace(recipe, stages=stages, target=Target(engine))
        packed = mixture and form.packs and bool(schemes)
        return packed or bool(target.problems(asked, schemes, {}, (), form, config))

    return [engine for engine in target.READS if not hinders(engine)]


def notes(recipe: Recipe, layers: Sequence[LayerPlan]) -> list[str]:
    """What a plan says of them."""
    also = recipe.checkpoint.also
    told = [f"the folder is converted to {', '.join(also)} as well, beside it"] if also else []
    return told + [_anew(name, layers) for name in also if name.startswith("gguf-")]


def _anew(name: str, layers: Sequence[LayerPlan]) -> str:
    """Which layers GGUF holds as they are quantized, and which it does not."""
    kind = kind_named(name)
    exact, anew = 0, Counter[str]()
    for layer in layers:
        found = type_for(kind, layer.shape[1]) if layer.block is not None else None
        if found and layer.scheme and found == type_of_grid(layer.scheme.weights, layer.shape[1]):
            exact += 1
        elif found:
            anew[found.name] += 1
    told = f", {anew.total()} are quantized anew from them ({types_said(anew)})" if anew else ""
    return f"{name}: {exact} layers keep their codes{told}"


def _at_odds(recipe: Recipe, index: int, config: Mapping[str, Any]) -> str | None:
    """No such format, one that is asked for twice, or one for which the run keeps nothing."""
    options, name = recipe.checkpoint, recipe.checkpoint.also[index]
    if name in (options.format, *options.also[:index]):
        return f"{name} is asked for already"
    if name.startswith("gguf-"):
        try:
            kind_named(name)
            architecture_of(config)
        except (ValueError, ModelError) as error:
            return str(error)
        return None
    known = [each for each in (*FORMATS, *GRAPHS) if each != sparse_24.NAME]
    if name not in known:
        advice = did_you_mean(name, known)
        return (
            f"there is no format {name!r} to convert to.{advice} There are {', '.join(known)}, gguf-q4_0, gguf-q4_k …"
        )
    if not format_for(options).packs:
        return f"a folder of {options.format} has no codes that {name} could hold. Use format compressed-tensors"
    if recipe.allocator and name in lint.ONE_SCHEME:
        return f"{name} holds layers of one scheme in a folder, and {recipe.allocator.name} gives them several"
    return None


def _beside(recipe: Recipe, name: str) -> str | None:
    """What belongs to the codes and has a place beside them in compressed-tensors only."""
    if recipe.view and recipe.view.online:
        return f"{name} cannot say that inputs are rotated while the model runs. Set r4: false"
    if recipe.cache and recipe.cache.static:
        return f"{name} has no place for the calibrated scales of the cache. Use kv8, or leave {name} out"
    if any(stage.name == "low_rank" for stage in recipe.stages):
        return f"{name} has no place for the adapter of low_rank. Leave one of them out"
    return None


def _unheld(
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    layers: Sequence[LayerName],
    form: Format,
    other: Format,
    dtype: str,
) -> Iterator[str]:
    """Layers that a format does not hold, and scales."""
    for layer in layers:
        if layer.name in schemes:
            yield from other.problems(layer.name, layer.kind, shapes[layer.name], schemes[layer.name])
    here, there = (each.scale_dtype(schemes.values()) for each in (form, other))
    here = here or DTYPES[dtype]
    if there and torch.finfo(there).eps > torch.finfo(here).eps:
        yield (
            f"{other.name} keeps scales in {there}, which has fewer digits than the {here} of {form.name}. "
            f"Use `checkpoint: {{format: {other.name}, also: [{form.name}]}}`"
        )
