"""Who does what: the layers a model has, the stage that quantizes each, and those that low_rank compensates.

What cannot be is collected in sentences, each with its place in the recipe, and left to the plan to raise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from compress.core.scheme import Scheme
from compress.errors import ModelError
from compress.models.anatomy import Anatomy
from compress.models.headers import TensorHeader
from compress.models.selection import LayerName, select
from compress.recipe import Recipe

COMPENSATOR = "low_rank"
"""The stage whose result is stored beside the weights."""


def candidates(anatomy: Anatomy, tensors: Mapping[str, TensorHeader], num_blocks: int) -> list[LayerName]:
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


def assign(recipe: Recipe, layers: Sequence[LayerName], problems: list[str]) -> tuple[dict[str, int], dict[str, str]]:
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


def prune(
    recipe: Recipe, layers: Sequence[LayerName], shapes: Mapping[str, tuple[int, int]], problems: list[str]
) -> dict[str, int]:
    """Layer → the stage that prunes it. `shapes`: of those that one may."""
    pruner: dict[str, int] = {}
    for index, stage in enumerate(recipe.stages):
        if stage.role != "pruner":
            continue
        where = recipe.where("stages", index, stage.name)
        chosen = _resolve(recipe, index, "layers", stage.layers, layers, problems)
        ignored = _resolve(recipe, index, "ignore", stage.ignore, layers, problems)
        names = [name for name in (chosen if stage.layers else shapes) if name not in ignored]
        if outside := [name for name in names if name not in shapes]:
            problems.append(f"{where}: {', '.join(outside)}: embeddings and heads keep their weights; leave them out")
        if twice := [name for name in names if name in pruner]:
            problems.append(
                f"{where}: {twice[0]} is pruned by stages[{pruner[twice[0]]}] already. Use 'layers' or 'ignore'"
            )
        names = [name for name in names if name in shapes]
        if not names:
            problems.append(f"{where}: stages[{index}].{stage.name} would change nothing: no layer is left for it")
        for name in names:
            try:
                stage.resolved.check(shapes[name][1])
            except ValueError as error:
                problems.append(f"{where}: {name}: {error}. Add it to 'ignore', or choose another pattern")
                break
        pruner |= dict.fromkeys(names, index)
    return pruner


def compensate(
    recipe: Recipe,
    layers: Sequence[LayerName],
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    online: Collection[str],
    problems: list[str],
) -> dict[str, int]:
    """Layer → the rank of the product that will make up for its rounding. `online`: inputs rotated while it runs."""
    found = [index for index, stage in enumerate(recipe.stages) if stage.name == COMPENSATOR]
    if not found:
        return {}
    index, *more = found
    stage = recipe.stages[index]
    where = recipe.where("stages", index, stage.name)
    for other in more:
        second = recipe.where("stages", other, stage.name)
        problems.append(f"{second}: one adapter holds all products, in one rank; leave out the second {stage.name}")
    if any(other.name == "bias_correction" for other in recipe.stages):
        problems.append(f"{where}: {stage.name} and bias_correction would make up for the same error; leave out one")
    chosen = _resolve(recipe, index, "layers", stage.layers, layers, problems)
    ignored = _resolve(recipe, index, "ignore", stage.ignore, layers, problems)
    names = [name for name in (chosen if stage.layers else schemes) if name not in ignored]
    for objection in _objections(stage.rank, names, schemes, shapes, online):
        problems.append(f"{where}: {objection}, or add what cannot have one to 'ignore'")
    if not names:
        problems.append(f"{where}: stages[{index}].{stage.name} would change nothing: no layer is left for it")
    return dict.fromkeys(names, stage.rank)


def _objections(
    rank: int,
    names: Sequence[str],
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    online: Collection[str],
) -> Iterator[str]:
    """Why some of these layers cannot have a product beside them, one sentence a reason."""

    def told(concerned: Sequence[str]) -> str:
        others = f" and {len(concerned) - 1} more layers" if len(concerned) > 1 else ""
        return f"{concerned[0]}{others}"

    if kept := [name for name in names if name not in schemes]:
        yield f"{told(kept)}: not quantized, so there is nothing to make up for. Leave it out"
    quantized = [name for name in names if name in schemes]
    raw = "and engines feed a low-rank product with inputs as they come"
    if rounded := [name for name in quantized if schemes[name].inputs]:
        yield f"{told(rounded)}: {schemes[rounded[0]].name} rounds inputs, {raw}. Use a scheme that ends in a16"
    if turned := [name for name in quantized if name in online]:
        yield f"{told(turned)}: inputs are rotated while it runs, {raw}. Set r4: false"
    if narrow := [name for name in quantized if rank > min(shapes[name])]:
        least = min(min(shapes[name]) for name in narrow)
        yield f"{told(narrow)}: rank={rank} is more than a matrix of {least} rows or columns has. Use at most {least}"


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
