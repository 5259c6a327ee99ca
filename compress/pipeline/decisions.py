"""What calibration decides before the walk: a rotation, scores of channels, bits and zeros of layers, cache schemes.

Each is decided once and noted in the manifest, where a run that is resumed finds it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint.manifest import Manifest
from compress.models.store import LazyModel
from compress.plan import Plan
from compress.scoring import Progress
from compress.stage import Shaper, View


def decide(
    plan: Plan,
    model: LazyModel,
    tokens: Int[Tensor, "windows length"],
    scratch: Path,
    manifest: Manifest,
    tell: Progress,
) -> tuple[Plan, LazyModel]:
    """The plan with all that it left open, and the model as its stages are to see it."""
    recipe = plan.recipe
    if recipe.view and recipe.view.calibrated:
        learned = _learned(recipe.view, plan, model, tokens, scratch, manifest, tell)
        plan = plan.having(learned)
        model = LazyModel(plan.open_weights(learned), dtype=model.dtype, device=str(model.device))
    if recipe.shaper and recipe.shaper.learns:
        plan = replace(plan, learned=_learned(recipe.shaper, plan, model, tokens, scratch, manifest, tell))
    if plan.units:
        if "allocation" not in manifest.facts:
            tell("allocate", 0.0, f"measuring {len(plan.units)} units")
            manifest.facts["allocation"] = recipe.allocator.decide(model, tokens, scratch / "decision", plan.units)
            manifest.save()
        plan = plan.decided(manifest.facts["allocation"]["bits"])
    for index, stage in enumerate(recipe.stages):
        if stage.role == "pruner" and stage.owl:
            plan = _owl(plan, index, model, tokens, scratch, manifest, tell)
    if recipe.cache and recipe.cache.scheme is None and "kv_cache" not in manifest.facts:
        tell("allocate", 0.0, f"measuring the caches of {plan.num_blocks} layers")
        manifest.facts["kv_cache"] = recipe.cache.decide(model, tokens, scratch / "decision")
        manifest.save()
    return plan, model


def _owl(
    plan: Plan, index: int, model: LazyModel, tokens: Tensor, scratch: Path, manifest: Manifest, tell: Progress
) -> Plan:
    """The plan with the zeros of a pruner's layers."""
    stage, key = plan.recipe.stages[index], f"zeros of stages[{index}]"
    if key not in manifest.facts:
        tell(stage.name, 0.0, f"looking for outliers in {plan.num_blocks} blocks")
        names = [layer.name for layer in plan.layers if layer.pruner == index]
        manifest.facts[key] = stage.decide(model, tokens, scratch / "decision", names)
        manifest.save()
    return replace(plan, zeros={**plan.zeros, **manifest.facts[key]})


def _learned(
    stage: View | Shaper,
    plan: Plan,
    model: LazyModel,
    tokens: Tensor,
    scratch: Path,
    manifest: Manifest,
    tell: Progress,
) -> dict[str, Tensor]:
    """What calibration teaches a stage about the model as a whole; it is kept in a file."""
    file = scratch / "learned.safetensors"
    if stage.name not in manifest.facts:
        tell(stage.name, 0.0, f"looking at {plan.num_blocks} blocks")
        found = stage.learn(model, tokens, scratch / "learning", plan.quantized)
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.tensors.items()}, file)
        manifest.facts[stage.name] = found.facts
        manifest.save()
    return load_file(file)
