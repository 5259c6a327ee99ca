"""The plan: what a recipe will do to a model, layer by layer and byte by byte, before any weight is read.

Recipe and headers go in; out comes the exact list of layers with their grids, the exact files that will be written,
the memory and the tokens that will be needed, or every reason why it cannot be done, all at once. `run` executes
exactly this plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from compress.checkpoint import FORMATS, Format, format_for
from compress.checkpoint.adapter import ADAPTER, Product, adapter_layout
from compress.core.kv import heads_of
from compress.core.scheme import Scheme
from compress.core.sparsity import Pattern
from compress.errors import ModelError, RecipeError
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, canonical, context_length, file_bytes, tensor_bytes
from compress.models.selection import did_you_mean
from compress.models.store import Weights, compute_dtype
from compress.plan import assignment, exports, lint, target
from compress.plan.footprint import peak_memory, training_memory
from compress.plan.layers import LayerPlan, layer_plan, num_blocks_of, shape_of, shards_of
from compress.plan.units import allotted, units_of
from compress.recipe import Recipe
from compress.stage import Unit

PROBE_WINDOWS = 2
"""Windows that a run without calibration sends through the model, so that its checkpoint can be verified."""
PROBE_LENGTH = 32


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before it begins."""

    recipe: Recipe
    folder: Folder
    """The model that comes in, as it lies on disk; behind a segment, as it will."""
    viewed: Folder
    """The model as the stages see it."""
    after: Folder
    """What the result looks like to a reader, but for what is quantized."""
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
    zeros: Mapping[str, float] = field(default_factory=dict)
    """Layer → its share of zeros, where a pruner has decided that from calibration."""
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    """What a shaper has learned of the model before the walk."""
    segments: tuple[Plan, ...] = ()
    """The runs that come first, of one stage each: those that change the model's shape, or train it."""
    asked: Recipe | None = None
    """The recipe as it was given, where calibration has yet to find its first stages."""

    @property
    def original(self) -> Folder:
        """The model that the whole run begins with, and is measured against."""
        return self.segments[0].folder if self.segments else self.folder

    def open_weights(self, learned: Mapping[str, Tensor] | None = None) -> Weights:
        """The tensors that the stages work on. `learned`: what a view has learned."""
        return self.recipe.view.weights(self.viewed, learned) if self.recipe.view else Weights(self.viewed)

    @property
    def calibrated(self) -> bool:
        """Whether any stage needs calibration inputs in the walk; a view has learned before it."""
        return any(stage.calibrated for stage in self.recipe.walked if stage.role != "view")

    @property
    def calibration_tokens(self) -> int:
        return self.windows * self.sequence_length if self.recipe.calibrated else 0

    @property
    def bytes_before(self) -> int:
        """Bytes of the weight files that come in."""
        return self.original.bytes

    @property
    def parameters_before(self) -> int:
        return num_parameters(self.original)

    @property
    def parameters_after(self) -> int:
        """Shapes counted, zeros and bits not."""
        return num_parameters(self.after)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weight files that will be written."""
        adapter = file_bytes(adapter_layout(self.products)) if self.products else 0
        return sum(file_bytes(shard, self.metadata) for shard in self.shards) + adapter

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of each of these files says besides its tensors."""
        entries = {name: entry for shard in self.shards for name, entry in shard.items()}
        return self.format.metadata(entries, self.quantized.values(), self.layers[0].dtype)

    @property
    def peak_memory_bytes(self) -> int:
        """Predicted peak of resident memory."""
        trained = max((num_parameters(plan.folder) for plan in self.segments if plan.recipe.trainer), default=0)
        walked = max([plan.walking_bytes for plan in (*self.segments, self)])
        return max(walked, training_memory(trained) if trained else 0)

    @property
    def walking_bytes(self) -> int:
        """Predicted peak of resident memory of the walk, and of scoring."""
        return peak_memory(
            [layer.shape for layer in self.layers if layer.block == 0],
            [layer.shape for layer in self.layers if layer.block is None],
            dtype=compute_dtype(self.layers[0].dtype, self.recipe.calibration.dtype),
            tokens=self.windows * self.sequence_length,
            calibrated=self.calibrated,
            two_streams=self.recipe.two_streams,
            learned=any(stage.name == "autoround" for stage in self.recipe.stages),
            differentiated=bool(self.recipe.shaper and self.recipe.shaper.learns),
            scored=self.anatomy.head is not None,
        )

    @property
    def quantized(self) -> dict[str, Scheme]:
        return {layer.name: layer.scheme for layer in self.layers if layer.scheme}

    @property
    def compact(self) -> frozenset[str]:
        """The pruned layers whose zeros are left out of the file."""
        return frozenset(layer.name for layer in self.layers if layer.compact)

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
        plan = _plan(self.recipe, self.folder, self.segments, bits)
        return replace(plan, windows=self.windows, notes=self.notes)

    def having(self, learned: Mapping[str, Tensor]) -> Plan:
        """The plan once a view has learned what it had to."""
        plan = _plan(self.recipe, self.folder, self.segments, learned=learned)
        return replace(plan, windows=self.windows, notes=self.notes)

    def on(self, folder: Folder) -> Plan:
        """The plan once the segments before it have left this folder."""
        plan = _plan(self.recipe, folder, self.segments)
        return replace(plan, windows=self.windows, notes=self.notes)

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

    def pruned(self, stage: int, block: int) -> dict[str, Pattern]:
        """The layers that a pruner deals with in one block, and the zeros of each."""
        pattern = self.recipe.stages[stage].resolved
        names = [layer.name for layer in self.layers if layer.block == block and layer.pruner == stage]
        return {name: Pattern(self.zeros[name]) if name in self.zeros else pattern for name in names}

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
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "bits_per_weight": self.bits_per_weight,
            "peak_memory_bytes": self.peak_memory_bytes,
            "calibration_tokens": self.calibration_tokens,
            "stages": [stage.name for stage in self.recipe.stages],
            "notes": [*self.notes, *exports.notes(self.recipe, self.layers)],
        }


def make_plan(recipe: Recipe, folder: Folder) -> Plan:
    """Resolve a recipe against a model's headers.

    Raises RecipeError listing every selector, group, fused pair or combination that cannot be, with its place in
    the recipe; ModelError where the model itself is the problem.
    """
    problems = lint.order(recipe)
    if problems:
        raise RecipeError(problems)
    segments: list[Plan] = []
    for index in recipe.segments:
        segments.append(_plan(recipe.only(index), segments[-1].after if segments else folder))
    return _plan(recipe, segments[-1].after if segments else folder, segments)


def _plan(
    recipe: Recipe,
    folder: Folder,
    segments: Sequence[Plan] = (),
    bits: Mapping[str, int] | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan of one walk, over what the `segments` before it leave.

    `bits`: layer → what an allocator has decided. `learned`: by a view, from calibration.
    """
    refuse_quantized(folder)
    problems: list[str] = []
    form = _format(recipe)
    calibrated = recipe.calibrated
    wanted = recipe.calibration.sequence_length if calibrated else PROBE_LENGTH
    length = min(wanted, context_length(folder.config))
    anatomy = anatomy_for(folder.config, folder.shapes)
    tensors = canonical(folder.tensors, anatomy)
    view, viewed = recipe.view, folder
    if view:
        problems += lint.view(recipe, view.problems(anatomy, tensors), form)
        viewed = folder if problems else view.folder(folder, anatomy, tensors, learned)
        tensors = canonical(viewed.tensors, anatomy)
    shaper, after = recipe.shaper, viewed
    if shaper:
        problems += lint.segment(recipe, shaper.problems(viewed, anatomy))
        after = viewed if problems else shaper.folder(viewed, anatomy)
    if recipe.trainer:
        problems += lint.segment(recipe, recipe.trainer.problems(anatomy, folder.config, length))
    num_blocks = num_blocks_of(viewed.config, anatomy, tensors)
    candidates = assignment.candidates(anatomy, tensors, num_blocks)
    owner, reasons = assignment.assign(recipe, candidates, problems)
    schemes = {name: recipe.stages[stage].resolved for name, stage in owner.items()}
    inside = {
        layer.name: shape_of(tensors[f"{layer.name}.weight"], anatomy)
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
    problems += lint.zeros(recipe, pruner, candidates, form)
    problems += lint.fused(anatomy, candidates, schemes)
    problems += lint.readers(recipe, schemes, form)
    problems += target.problems(recipe, schemes, shapes, candidates, form, after.config)
    stored = next((tensors[f"{name}.weight"].dtype for name in schemes), "BF16")
    problems += exports.problems(recipe, schemes, shapes, candidates, form, stored, after.config)
    online = view.weights(viewed).online if view and view.online and not problems else ()
    ranks = assignment.compensate(recipe, candidates, schemes, shapes, online, problems)
    if problems:
        raise RecipeError(problems)
    layers = tuple(
        layer_plan(layer, anatomy, tensors[f"{layer.name}.weight"], owner, schemes, ranks, pruner, reasons, form)
        for layer in candidates
    )
    notes = [*anatomy.conclusions, *folder.truncated, *target.notes(recipe, schemes)]
    if anatomy.mixture:
        notes.append("mixture of experts: no stage quantizes expert matrices and routers")
        if schemes and form.packs:
            notes.append("packed layers beside experts in floats: compress.load reads that, transformers 5.24 does not")
    if calibrated and length < recipe.calibration.sequence_length:
        notes.append(f"calibration windows have {length} tokens, the model's context")
    if anatomy.head and f"{anatomy.head}.weight" not in tensors:
        notes.append(f"{anatomy.head} is tied to {anatomy.embedding} and stays as it is")
    if units:
        budget = recipe.allocator.budget(units)
        notes.append(
            f"bits are decided once calibration has been seen, within {budget:,} bytes; a plan shows uniform ones"
        )
    if view and not view.shrinks and len(viewed.tensors) > len(folder.tensors):
        notes.append(f"{anatomy.head} was tied to {anatomy.embedding}; rotated it has a weight of its own")
    if view and view.online:
        notes.append("inputs are rotated while the model runs: vLLM and compress.load do that, transformers does not")
    if any(layer.compact for layer in layers):
        notes.append("zeros are left out: compress.load reads that, transformers and engines take format dense")
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
        after=after,
        anatomy=anatomy,
        layers=layers,
        format=form,
        num_blocks=num_blocks,
        shards=shards_of(
            anatomy,
            canonical(after.tensors, anatomy),
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
        segments=tuple(segments),
    )


def refuse_quantized(folder: Folder) -> None:
    """Raise ModelError for a folder whose weights are on grids already."""
    if found := folder.config.get("quantization_config"):
        method = found.get("quant_method", "unknown")
        raise ModelError(f"{folder.path}: is quantized already ({method}). Start from the original model")


def num_parameters(folder: Folder) -> int:
    """Numbers in all tensors of a folder."""
    return sum(prod(header.shape) for header in folder.tensors.values())


def _format(recipe: Recipe) -> Format:
    wanted = recipe.checkpoint.format
    if wanted not in FORMATS:
        where = recipe.where("checkpoint", "format")
        known = ", ".join(FORMATS)
        raise RecipeError(f"{where}: there is no format {wanted!r}.{did_you_mean(wanted, FORMATS)} There are {known}")
    return format_for(recipe.checkpoint)
