"""What speaks against a plan: each function looks for one kind of mistake and returns a sentence for every one.

None of these is found by running: a run would fail hours later, or the serving engine would refuse its result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from compress.checkpoint import Format, sparse_24
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.selection import LayerName
from compress.recipe import LEARNER, Recipe, is_segment
from compress.stage import Unit

ONE_SCHEME = ("awq", "bitsandbytes", "gptq", "gptq_v2", "torchao")
"""Formats whose config says once how all layers are quantized."""
SIZES = (256, 128, 64, 32, 16)
"""Group sizes that engines have kernels for, offered in place of one that does not divide."""
KEEP_ZEROS = ("rtn", "gptq")
"""Quantizers that leave zeros as they are."""


def order(recipe: Recipe) -> list[str]:
    """Stages that make another model, of another shape or trained, behind one that works on the model as it is."""
    problems = [
        f"{recipe.where('stages', index, stage.name)}: {stage.name} stands for the first stages; put it first"
        for index, stage in enumerate(recipe.stages)
        if stage.role == "searcher"
    ]
    for stage in recipe.walked[1:]:
        if is_segment(stage) or stage.name == LEARNER:
            where = recipe.where("stages", recipe.stages.index(stage), stage.name)
            problems.append(f"{where}: {stage.name} makes another model; put it before {recipe.walked[0].name}")
    return problems


def segment(recipe: Recipe, problems: Sequence[str]) -> list[str]:
    """What speaks against a segment: the `problems` of its only stage."""
    return [f"{recipe.where('stages', 0, recipe.stages[0].name)}: {problem}" for problem in problems]


def stages(recipe: Recipe, anatomy: Anatomy, owner: Mapping[str, int], biased: bool) -> list[str]:
    """Stages that would change nothing, or stand where they cannot work.

    `owner`: layer → stage. `biased`: whether any of these layers has a bias.
    """
    problems = []
    quantizers = [index for index, stage in enumerate(recipe.stages) if stage.role == "quantizer"]
    for index, stage in enumerate(recipe.stages):
        where = recipe.where("stages", index, stage.name)
        if is_segment(stage):
            continue
        if stage.role == "quantizer":
            if index not in owner.values():
                problems.append(f"{where}: stages[{index}].{stage.name} would change nothing: no layer is left for it")
            continue
        if stage.role == "corrector":
            if any(later > index for later in quantizers) or not quantizers:
                problems.append(f"{where}: {stage.name} makes up for what quantizers lost; put it after all of them")
            if stage.name == "bias_correction" and not biased:
                problems.append(f"{where}: {stage.name} would change nothing: no quantized layer has a bias")
            continue
        if stage.role == "pruner":
            problems += _after_pruning(recipe, index)
            continue
        if stage.role == "cache":
            if stage is not recipe.cache:
                problems.append(f"{where}: one {stage.name} holds for all layers; leave out the second")
            continue
        if stage.role == "allocator" and stage is not recipe.allocator:
            problems.append(f"{where}: one {stage.name} decides for all layers; leave out the second")
        if not any(later > index for later in quantizers):
            problems.append(f"{where}: {stage.name} prepares weights for a quantizer; put rtn or gptq after it")
        if stage.role == "view" and stage is not recipe.view:
            problems.append(f"{where}: {stage.name} must be the first stage: those after it see the model it makes")
        if any(earlier < index for earlier in quantizers):
            problems.append(f"{where}: {stage.name} must come before every quantizer")
        if stage.for_inputs and not any(recipe.stages[later].resolved.inputs for later in quantizers):
            problems.append(
                f"{where}: {stage.name} looks at rounded inputs, and no later scheme rounds any, as w8a8 does"
            )
        if stage.role == "transform" and not any(site.source for site in anatomy.sites):
            problems.append(f"{where}: {stage.name} has nowhere to fold its scales in the {anatomy.family} family")
    return problems


def _after_pruning(recipe: Recipe, index: int) -> list[str]:
    """Stages that would fill the zeros again, or come too late to keep them."""
    stage = recipe.stages[index]
    where = recipe.where("stages", index, stage.name)
    problems = []
    if any(earlier.role == "quantizer" for earlier in recipe.stages[:index]):
        problems.append(f"{where}: {stage.name} must come before every quantizer")
    for later in recipe.stages[index + 1 :]:
        if later.role == "quantizer" and later.name not in KEEP_ZEROS:
            told = " or ".join(KEEP_ZEROS)
            problems.append(f"{where}: {later.name} would move weights that are zero. Use {told} behind {stage.name}")
        if later.name == "low_rank":
            problems.append(f"{where}: the product of {later.name} would fill the zeros; leave one of them out")
    return problems


def view(recipe: Recipe, problems: Sequence[str], form: Format) -> list[str]:
    """What speaks against changing the model as a whole: the stage's own `problems`, and what cannot be stored."""
    where = recipe.where("stages", recipe.stages.index(recipe.view), recipe.view.name)
    found = [f"{where}: {problem}" for problem in problems]
    if recipe.view.online and form.name != "compressed-tensors":
        folder = f"a folder of {form.name}" if form.packs else "an ordinary folder"
        found.append(f"{where}: {folder} cannot say that inputs are rotated. Set r4: false")
    return found


def cache(recipe: Recipe, problems: Sequence[str], form: Format) -> list[str]:
    """What speaks against keeping keys and values so: the stage's own `problems`, and scales that nothing can hold."""
    index = recipe.stages.index(recipe.cache)
    where = recipe.where("stages", index, recipe.cache.name)
    found = [f"{where}: {problem}" for problem in problems]
    if recipe.cache.static and form.name != "compressed-tensors":
        found.append(
            f"{where}: scheme {recipe.cache.scheme} has calibrated scales, which checkpoints of {form.name} cannot "
            "hold. Use kv8, or format compressed-tensors"
        )
    if recipe.cache.static and any(stage.role == "quantizer" for stage in recipe.stages[index:]):
        found.append(f"{where}: {recipe.cache.name} measures keys and values of the compressed model; put it last")
    return found


def allocation(recipe: Recipe, units: Sequence[Unit], form: Format) -> list[str]:
    """An allocator with nothing to decide, too little to spend, or choices that the format cannot hold side by side."""
    index = recipe.stages.index(recipe.allocator)
    where = recipe.where("stages", index, recipe.allocator.name)
    if any(scheme.weights.kind != "int" for unit in units for scheme in unit.schemes):
        return [f"{where}: only integer schemes come in several widths; give the quantizer one like w4a16"]
    least = sum(min(unit.bytes) for unit in units)
    problems = []
    if least > recipe.allocator.budget(units):
        bits = 8 * least / sum(unit.num_weights for unit in units)
        problems.append(
            f"{recipe.where('stages', index, recipe.allocator.name, 'bits_per_weight')}: bits_per_weight="
            f"{recipe.allocator.bits_per_weight} is less than the {bits:.3f} that the smallest choice takes with its "
            "scales. Raise it, offer fewer bits, or use larger groups"
        )
    offered = {str(choice): scheme for unit in units for choice, scheme in enumerate(unit.schemes)}
    return problems + readers(recipe, offered, form)


def groups(
    recipe: Recipe, owner: Mapping[str, int], schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Groups that do not divide the rows of some layers: one sentence a stage, with sizes that fit all of them."""
    names_by_stage: dict[int, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        size = scheme.weights.group_size
        if size and shapes[name][1] % size:
            names_by_stage[owner[name]].append(name)
    problems = []
    for index, names in names_by_stage.items():
        stage = recipe.stages[index]
        widths = sorted({shapes[name][1] for name in names})
        fits = [str(size) for size in SIZES if all(width % size == 0 for width in widths)][:2]
        fix = f"Use {' or '.join(fits)}" if fits else "Use group_size: null (one scale per channel)"
        if stage.resolved.weights.kind != "int":
            fix = f"The groups of {stage.scheme} are fixed: choose another scheme"
        others = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
        problems.append(
            f"{recipe.where('stages', index, stage.name, 'group_size')}: {names[0]}{others}: "
            f"in_features={', '.join(map(str, widths))} is not a multiple of "
            f"group_size={stage.resolved.weights.group_size}. "
            f"{fix}, or add what it does not divide to 'ignore'"
        )
    return problems


def storage(
    recipe: Recipe,
    owner: Mapping[str, int],
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    layers: Sequence[LayerName],
    form: Format,
) -> list[str]:
    """Layers that the checkpoint's format cannot hold: the first of each kind."""
    found: dict[tuple[int, str], str] = {}
    for layer in (layer for layer in layers if layer.name in schemes):
        for problem in form.problems(layer.name, layer.kind, shapes[layer.name], schemes[layer.name]):
            found.setdefault((owner[layer.name], layer.kind), problem)
    return [
        f"{recipe.where('stages', index, recipe.stages[index].name)}: {problem}"
        for (index, _), problem in found.items()
    ]


def zeros(recipe: Recipe, pruner: Mapping[str, int], layers: Sequence[LayerName], form: Format) -> list[str]:
    """Zeros that are to be left out of the file and cannot be: the first of each kind. `pruner`: layer → stage."""
    if form.name != sparse_24.NAME:
        return []
    found: dict[tuple[int, str], str] = {}
    for layer in (layer for layer in layers if layer.name in pruner):
        index = pruner[layer.name]
        for problem in sparse_24.problems(layer.name, layer.kind, recipe.stages[index].resolved):
            found.setdefault(
                (index, layer.kind), f"{recipe.where('stages', index, recipe.stages[index].name)}: {problem}"
            )
    if not any(stage.role == "pruner" for stage in recipe.stages):
        where = recipe.where("checkpoint", "format")
        return [f"{where}: no stage prunes, so {form.name} has nothing to leave out. Use format dense"]
    return [*found.values()]


def readers(recipe: Recipe, schemes: Mapping[str, Scheme], form: Format) -> list[str]:
    """Combinations that are stored faithfully and that transformers would still read wrongly."""
    found = sorted(set(schemes.values()), key=str)
    if form.name in ONE_SCHEME and len(found) > 1:
        told = ", ".join(scheme.name for scheme in found)
        return [
            f"{recipe.where('stages')}: {told}: {form.name} holds layers of one scheme in a folder. "
            "Use one, or `checkpoint: {format: dense}`"
        ]
    if form.name != "compressed-tensors" or len(found) < 2 or all(scheme.weights.symmetric for scheme in found):
        return []
    told = ", ".join(f"{scheme.name} {'symmetric' if scheme.weights.symmetric else 'asymmetric'}" for scheme in found)
    return [
        f"{recipe.where('stages')}: {told}: transformers reads several grids in one folder only when all are "
        "symmetric. Set symmetric: true everywhere, or use one grid, or `checkpoint: {format: dense}`"
    ]


def fused(anatomy: Anatomy, layers: Sequence[LayerName], schemes: Mapping[str, Scheme]) -> list[str]:
    """Layers that a serving engine runs as one matrix, quantized differently: the first block of each kind."""
    present = {layer.name: layer for layer in layers}
    prefixes = sorted({".".join(name.split(".")[: anatomy.blocks.count(".") + 2]) for name in present})
    problems = []
    for site in (site for site in anatomy.sites if site.fused):
        for prefix in prefixes:
            found = {local: schemes.get(f"{prefix}.{local}") for local in site.layers if f"{prefix}.{local}" in present}
            if len(set(found.values())) > 1:
                told = ", ".join(f"{name} {each.name if each else 'kept'}" for name, each in sorted(found.items()))
                problems.append(
                    f"{prefix}: {told}: serving engines run these as one matrix; "
                    "give them the same scheme and group_size, or ignore all of them"
                )
                break
    return problems
