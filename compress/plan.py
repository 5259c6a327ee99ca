"""The plan: what a recipe will do to a model, layer by layer and byte by byte, before any weight is read.

Recipe and headers go in; out comes the exact list of layers with their grids, the exact files that will be written,
the memory and the tokens that will be needed, or every reason why it cannot be done, all at once. `run` executes
exactly this plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from compress import assignment, lint
from compress.checkpoint import FORMATS, Format, format_for, kv_cache
from compress.checkpoint.adapter import ADAPTER, Product, adapter_layout
from compress.core.kv import KVScheme, heads_of
from compress.core.scheme import Scheme
from compress.errors import ModelError, RecipeError
from compress.footprint import peak_memory
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, canonical, file_bytes, tensor_bytes
from compress.models.selection import LayerName, did_you_mean
from compress.models.store import Weights, compute_dtype
from compress.recipe import Recipe
from compress.stage import Unit
from compress.units import allotted, units_of

PROBE_WINDOWS = 2
"""Windows that a run without calibration sends through the model, so that its checkpoint can be verified."""
PROBE_LENGTH = 32


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
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def action(self) -> str:
        return "quantize" if self.scheme else "keep" if self.pruner is None else "prune"


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before it begins."""

    recipe: Recipe
    folder: Folder
    """The model as it lies on disk."""
    viewed: Folder
    """The model as the stages see it."""
    anatomy: Anatomy
    layers: tuple[LayerPlan, ...]
    format: Format
    num_blocks: int
    shards: tuple[dict[str, tuple[str, tuple[int, ...]]], ...]
    """For each output file, tensor name → (dtype, shape); one file per block, then the rest."""
    windows: int
    sequence_length: int
    notes: tuple[str, ...]
    units: tuple[Unit, ...] = ()
    """What an allocator chooses for; the schemes above are those of a uniform choice until it has."""

    def open_weights(self, learned: Tensor | None = None) -> Weights:
        """The tensors that the stages work on. `learned`: what a view has learned."""
        return self.recipe.view.weights(self.viewed, learned) if self.recipe.view else Weights(self.viewed)

    @property
    def calibrated(self) -> bool:
        return self.recipe.calibrated

    @property
    def calibration_tokens(self) -> int:
        return self.windows * self.sequence_length if self.calibrated else 0

    @property
    def bytes_before(self) -> int:
        """Bytes of the weight files that come in."""
        return self.folder.bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of the weight files that will be written."""
        adapter = file_bytes(adapter_layout(self.products)) if self.products else 0
        return sum(file_bytes(shard) for shard in self.shards) + adapter

    @property
    def peak_memory_bytes(self) -> int:
        """Predicted peak of resident memory."""
        return peak_memory(
            [layer.shape for layer in self.layers if layer.block == 0],
            [layer.shape for layer in self.layers if layer.block is None],
            dtype=compute_dtype(self.layers[0].dtype, self.recipe.calibration.dtype),
            tokens=self.windows * self.sequence_length,
            calibrated=self.calibrated,
            two_streams=self.recipe.two_streams,
            learned=any(stage.name == "autoround" for stage in self.recipe.stages),
            scored=self.anatomy.head is not None,
        )

    @property
    def quantized(self) -> dict[str, Scheme]:
        return {layer.name: layer.scheme for layer in self.layers if layer.scheme}

    @property
    def products(self) -> dict[str, Product]:
        """What the adapter holds, by layer; nothing where the format takes products into the weights."""
        return {
            layer.name: (layer.shape[0], layer.rank, layer.shape[1])
            for layer in self.layers
            if layer.rank and self.format.packs
        }

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight over the quantized layers; scales, zero points and low-rank products included."""
        layers = [layer for layer in self.layers if layer.scheme]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        return 8 * sum(layer.bytes_after for layer in layers) / weights if weights else None

    @property
    def tensor_bytes_after(self) -> int:
        """Bytes of the tensors that the model itself is made of."""
        return sum(tensor_bytes(*entry) for shard in self.shards for entry in shard.values())

    @property
    def context(self) -> int:
        """Length of the windows a run is scored on: the model's context, at most 2048."""
        return min(2048, context_length(self.folder.config))

    def decided(self, bits: Mapping[str, int]) -> Plan:
        """The plan once an allocator has decided: layer → bits."""
        return replace(make_plan(self.recipe, self.folder, bits), windows=self.windows, notes=self.notes)

    def with_windows(self, windows: int) -> Plan:
        """The plan for a text that holds fewer windows than the recipe asks for."""
        note = f"the calibration text holds {windows} windows, {self.windows} were asked for"
        return replace(self, windows=windows, notes=(*self.notes, note))

    def schemes(self, stage: int, block: int) -> dict[str, Scheme]:
        """The quantized layers a stage deals with in one block: a quantizer with its own, low_rank with those it was
        given, any other with all."""
        role, name = self.recipe.stages[stage].role, self.recipe.stages[stage].name

        def concerns(layer: LayerPlan) -> bool:
            return layer.stage == stage if role == "quantizer" else bool(layer.rank) or name != assignment.COMPENSATOR

        return {
            layer.name: layer.scheme
            for layer in self.layers
            if layer.scheme and layer.block == block and concerns(layer)
        }

    def pruned(self, stage: int, block: int) -> list[str]:
        """The layers that a pruner deals with in one block."""
        return [layer.name for layer in self.layers if layer.block == block and layer.pruner == stage]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "model": str(self.folder.path),
            "family": self.anatomy.family,
            "layers": [
                {
                    "name": layer.name,
                    "role": layer.role,
                    "action": layer.action,
                    "scheme": layer.scheme.name if layer.scheme else None,
                    "reason": layer.reason,
                    "shape": list(layer.shape),
                    "group_size": layer.scheme.weights.group_size if layer.scheme else None,
                    "rank": layer.rank,
                    "sparsity": None if layer.pruner is None else self.recipe.stages[layer.pruner].resolved.name,
                    "bytes_before": layer.bytes_before,
                    "bytes_after": layer.bytes_after,
                }
                for layer in self.layers
            ],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "peak_memory_bytes": self.peak_memory_bytes,
            "calibration_tokens": self.calibration_tokens,
            "stages": [stage.name for stage in self.recipe.stages],
            "notes": list(self.notes),
        }


def make_plan(recipe: Recipe, folder: Folder, bits: Mapping[str, int] | None = None) -> Plan:
    """Resolve a recipe against a model's headers. `bits`: layer → what an allocator has decided.

    Raises RecipeError listing every selector, group, fused pair or combination that cannot be, with its place in
    the recipe; ModelError where the model itself is the problem.
    """
    if folder.config.get("quantization_config"):
        method = folder.config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{folder.path}: is quantized already ({method}). Start from the original model")
    problems: list[str] = []
    form = _format(recipe)
    anatomy = anatomy_for(folder.config, folder.shapes)
    tensors = canonical(folder.tensors, anatomy)
    view, viewed = recipe.view, folder
    if view:
        problems += lint.view(recipe, view.problems(anatomy, tensors), form)
        viewed = view.folder(folder, anatomy, tensors)
        tensors = canonical(viewed.tensors, anatomy)
    num_blocks = _num_blocks(folder.config, anatomy, tensors)
    candidates = assignment.candidates(anatomy, tensors, num_blocks)
    owner, reasons = assignment.assign(recipe, candidates, problems)
    schemes = {name: recipe.stages[stage].resolved for name, stage in owner.items()}
    inside = {
        layer.name: _shape(tensors[f"{layer.name}.weight"], anatomy)
        for layer in candidates
        if layer.name.startswith(f"{anatomy.blocks}.")
    }
    shapes = {name: shape for name, shape in inside.items() if name in schemes}
    pruner = assignment.prune(recipe, candidates, inside, problems)
    problems += lint.stages(recipe, anatomy, owner, any(f"{name}.bias" in tensors for name in owner))
    if recipe.cache:
        problems += lint.cache(recipe, recipe.cache.problems(anatomy, folder.config), form)
    problems += lint.groups(recipe, owner, schemes, shapes)
    units: list[Unit] = []
    if recipe.allocator and not problems:
        types = {name: tensors[f"{name}.weight"].dtype for name in schemes}
        units = units_of(recipe.allocator.choices, anatomy, schemes, shapes, types, form)
        problems += lint.allocation(recipe, units, form)
        schemes |= allotted(recipe.allocator.budget(units), units, bits)
    problems += lint.storage(recipe, owner, schemes, shapes, candidates, form)
    problems += lint.fused(anatomy, candidates, schemes)
    problems += lint.readers(recipe, schemes, form)
    online = view.weights(viewed).online if view and view.online and not problems else ()
    ranks = assignment.compensate(recipe, candidates, schemes, shapes, online, problems)
    if problems:
        raise RecipeError(problems)
    layers = tuple(
        _layer_plan(layer, anatomy, tensors[f"{layer.name}.weight"], owner, schemes, ranks, pruner, reasons, form)
        for layer in candidates
    )
    notes = [*anatomy.conclusions, *folder.truncated]
    calibrated = recipe.calibrated
    context = context_length(folder.config)
    length = min(recipe.calibration.sequence_length, context) if calibrated else min(PROBE_LENGTH, context)
    if calibrated and length < recipe.calibration.sequence_length:
        notes.append(f"calibration windows have {length} tokens, the model's context")
    if anatomy.head and f"{anatomy.head}.weight" not in tensors:
        notes.append(f"{anatomy.head} is tied to {anatomy.embedding} and stays as it is")
    if units:
        budget = recipe.allocator.budget(units)
        notes.append(
            f"bits are decided once calibration has been seen, within {budget:,} bytes; a plan shows uniform ones"
        )
    if len(viewed.tensors) > len(folder.tensors):
        notes.append(f"{anatomy.head} was tied to {anatomy.embedding}; rotated it has a weight of its own")
    if view and view.online:
        notes.append("inputs are rotated while the model runs: vLLM and compress.load do that, transformers does not")
    if recipe.cache:
        notes.append(recipe.cache.summary(folder.config, num_blocks))
    if ranks and form.packs:
        notes.append(
            f"{ADAPTER}/ makes up for {len(ranks)} layers, by a LoRA of rank {max(ranks.values())}: compress.load "
            "adds it, transformers with PEFT and serving engines have to be given it"
        )
    return Plan(
        recipe=recipe,
        folder=folder,
        viewed=viewed,
        anatomy=anatomy,
        layers=layers,
        format=form,
        num_blocks=num_blocks,
        shards=_shards(
            anatomy,
            tensors,
            num_blocks,
            {layer.name: layer for layer in layers},
            form,
            recipe.cache.static if recipe.cache else None,
            heads_of(folder.config)[0],
        ),
        windows=recipe.calibration.samples if calibrated else PROBE_WINDOWS,
        sequence_length=length,
        notes=tuple(notes),
        units=tuple(units),
    )


def context_length(config: Mapping[str, Any]) -> int:
    """The longest sequence the model was made for; 2048 where its config does not say."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        if isinstance(config.get(key), int):
            return config[key]
    return 2048


def _format(recipe: Recipe) -> Format:
    wanted = recipe.checkpoint.format
    if wanted not in FORMATS:
        where = recipe.where("checkpoint", "format")
        known = ", ".join(FORMATS)
        raise RecipeError(f"{where}: there is no format {wanted!r}.{did_you_mean(wanted, FORMATS)} There are {known}")
    return format_for(recipe.checkpoint)


def _num_blocks(config: Mapping[str, Any], anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> int:
    """Blocks the model runs. Files may hold more, heads that predict several tokens, say; those are only copied."""
    prefix = f"{anatomy.blocks}."
    stored = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int):
            return config[key]
    return len(stored)


def _shape(header: TensorHeader, anatomy: Anatomy) -> tuple[int, int]:
    first, second = header.shape
    return (second, first) if anatomy.transposed else (first, second)


def _layer_plan(
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
    shape = _shape(header, anatomy) if inside else (header.shape[0], header.shape[1])
    held = {f"{layer.name}.weight": (header.dtype, header.shape)}
    if scheme:
        held = form.layout(layer.name, shape, scheme, header.dtype)
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
        reason="" if scheme or layer.name in pruner else reasons.get(layer.name, "no stage names it"),
        bytes_before=header.nbytes,
        bytes_after=sum(tensor_bytes(*entry) for entry in held.values()),
    )


def _shards(
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
        else:
            shard[header.name] = header.dtype, header.shape
        if cache and layer and layer.role == "attn.o" and name.endswith(".weight"):
            shard |= kv_cache.layout(header, cache, kv_heads)
    return tuple(shards)
