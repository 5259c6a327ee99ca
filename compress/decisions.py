"""What calibration decides before the walk: a rotation, bits and zeros of layers, the cache schemes of blocks.

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
        plan, model = _learned(plan, model, tokens, scratch, manifest, tell)
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
    plan: Plan, model: LazyModel, tokens: Tensor, scratch: Path, manifest: Manifest, tell: Progress
) -> tuple[Plan, LazyModel]:
    """Plan and model as a view shows them that has learned from calibration."""
    view, file = plan.recipe.view, scratch / "learned.safetensors"
    if view.name not in manifest.facts:
        tell(view.name, 0.0, f"looking at {plan.num_blocks} blocks")
        found = view.learn(model, tokens, scratch / "learning", plan.quantized)
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.tensors.items()}, file)
        manifest.facts[view.name] = found.facts
        manifest.save()
    learned = load_file(file)
    plan = plan.having(learned)
    return plan, LazyModel(plan.open_weights(learned), dtype=model.dtype, device=str(model.device))
