"""The plan: what a recipe will do to a model, layer by layer and byte by byte, before any weight is read.

Recipe and headers go in; out comes the exact list of layers with their grids, the exact files that will be written,
the memory and the tokens that will be needed, or every reason why it cannot be done, all at once. `run` executes
exactly this plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress import lint
from compress.checkpoint import FORMATS, Format, format_for
from compress.core.scheme import Scheme
from compress.errors import ModelError, RecipeError
from compress.footprint import peak_memory
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, canonical, file_bytes, tensor_bytes
from compress.models.selection import LayerName, did_you_mean, select
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
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def action(self) -> str:
        return "quantize" if self.scheme else "keep"


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

    def open_weights(self) -> Weights:
        """The tensors that the stages work on."""
        return self.recipe.view.weights(self.viewed) if self.recipe.view else Weights(self.viewed)

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
        return sum(file_bytes(shard) for shard in self.shards)

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
    def bits_per_weight(self) -> float:
        """Bits per weight over the quantized layers, scales and zero points included."""
        layers = [layer for layer in self.layers if layer.scheme]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        return 8 * sum(layer.bytes_after for layer in layers) / weights

    @property
    def tensor_bytes_after(self) -> int:
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
        """The layers a stage deals with in one block: a quantizer's own; for a transform, those quantized later."""
        own = self.recipe.stages[stage].role == "quantizer"
        return {
            layer.name: layer.scheme
            for layer in self.layers
            if layer.scheme and layer.block == block and (layer.stage == stage if own else True)
        }

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
    candidates = _candidates(anatomy, tensors, num_blocks)
    owner, reasons = _assign(recipe, candidates, problems)
    schemes = {name: recipe.stages[stage].resolved for name, stage in owner.items()}
    shapes = {
        layer.name: _shape(tensors[f"{layer.name}.weight"], anatomy) for layer in candidates if layer.name in schemes
    }
    problems += lint.stages(recipe, anatomy, owner, any(f"{name}.bias" in tensors for name in owner))
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
    if problems:
        raise RecipeError(problems)
    layers = tuple(
        _layer_plan(layer, anatomy, tensors[f"{layer.name}.weight"], owner, schemes, reasons, form)
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
    return Plan(
        recipe=recipe,
        folder=folder,
        viewed=viewed,
        anatomy=anatomy,
        layers=layers,
        format=form,
        num_blocks=num_blocks,
        shards=_shards(anatomy, tensors, num_blocks, {layer.name: layer for layer in layers}, form),
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


def _candidates(anatomy: Anatomy, tensors: Mapping[str, TensorHeader], num_blocks: int) -> list[LayerName]:
    """Every layer a selector may name, in the order of the model: block linears, then embedding and head."""
    kind = "Conv1D" if anatomy.transposed else "Linear"
    layers = []
    for index in range(num_blocks):
        for local, role in anatomy.roles.items():
            name = f"{anatomy.blocks}.{index}.{local}"
            if f"{name}.weight" in tensors:
                layers.append(LayerName(name, role, kind))
    if not layers:
        raise ModelError(f"no linear layer found under {anatomy.blocks!r}, where the {anatomy.family} family has them")
    outside = [(anatomy.embedding, "embedding", "Embedding"), (anatomy.head or "", "lm_head", "Linear")]
    layers += [LayerName(*entry) for entry in outside if f"{entry[0]}.weight" in tensors]
    return layers


def _assign(recipe: Recipe, layers: Sequence[LayerName], problems: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Which stage quantizes each layer, and why the others are kept."""
    owner: dict[str, int] = {}
    reasons = {layer.name: "outside the blocks" for layer in layers if layer.role in {"embedding", "lm_head"}}
    inside = [layer.name for layer in layers if layer.name not in reasons]
    known = list(layers)
    if not any(layer.role == "lm_head" for layer in layers):
        known.append(LayerName("lm_head", "lm_head", "Linear"))  # tied: may be named, has no weight of its own
    for index, stage in enumerate(recipe.stages):
        if stage.role != "quantizer":
            continue
        chosen = _resolve(recipe, index, "layers", stage.layers, known, problems)
        ignored = _resolve(recipe, index, "ignore", stage.ignore, known, problems)
        outside = [name for name in chosen if name not in inside]
        if outside:
            where = recipe.where("stages", index, stage.name, "layers")
            problems.append(f"{where}: {', '.join(outside)}: embeddings and heads keep their precision; leave them out")
        for name in inside if not stage.layers else [name for name in chosen if name in inside]:
            if name in ignored:
                reasons[name] = f"ignored by {ignored[name]!r}"
            elif name in owner:
                where = recipe.where("stages", index, stage.name)
                problems.append(
                    f"{where}: {name} is quantized by stages[{owner[name]}] already. Use 'layers' or 'ignore'"
                )
            else:
                owner[name] = index
    return owner, reasons


def _resolve(
    recipe: Recipe,
    index: int,
    key: str,
    selectors: Sequence[str],
    layers: Sequence[LayerName],
    problems: list[str],
) -> dict[str, str]:
    """Layer name → the selector that names it."""
    names_by_selector, unmatched = select(selectors, layers)
    where = recipe.where("stages", index, recipe.stages[index].name, key)
    problems += [f"{where}: stages[{index}].{recipe.stages[index].name}.{key}: {problem}" for problem in unmatched]
    return {name: selector for selector, names in names_by_selector.items() for name in names}


def _shape(header: TensorHeader, anatomy: Anatomy) -> tuple[int, int]:
    first, second = header.shape
    return (second, first) if anatomy.transposed else (first, second)


def _layer_plan(
    layer: LayerName,
    anatomy: Anatomy,
    header: TensorHeader,
    owner: Mapping[str, int],
    schemes: Mapping[str, Scheme],
    reasons: Mapping[str, str],
    form: Format,
) -> LayerPlan:
    inside = layer.name.startswith(f"{anatomy.blocks}.")
    scheme = schemes.get(layer.name)
    shape = _shape(header, anatomy) if inside else (header.shape[0], header.shape[1])
    after = header.nbytes
    if scheme:
        after = sum(tensor_bytes(*entry) for entry in form.layout(layer.name, shape, scheme, header.dtype).values())
    return LayerPlan(
        name=layer.name,
        role=layer.role,
        kind=layer.kind,
        block=int(layer.name.removeprefix(f"{anatomy.blocks}.").split(".")[0]) if inside else None,
        shape=shape,
        dtype=header.dtype,
        stage=owner.get(layer.name),
        scheme=scheme,
        reason="" if scheme else reasons.get(layer.name, "no stage names it"),
        bytes_before=header.nbytes,
        bytes_after=after,
    )


def _shards(
    anatomy: Anatomy,
    tensors: Mapping[str, TensorHeader],
    num_blocks: int,
    layers: Mapping[str, LayerPlan],
    form: Format,
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
    return tuple(shards)
