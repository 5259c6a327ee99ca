"""What calibration decides before the walk: a rotation, the bits of layers, the cache schemes of blocks.

Each is decided once and noted in the manifest, where a run that is resumed finds it.
"""

from __future__ import annotations

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
        model = _learned(plan, model, tokens, scratch, manifest, tell)
    if plan.units:
        if "allocation" not in manifest.facts:
            tell("allocate", 0.0, f"measuring {len(plan.units)} units")
            manifest.facts["allocation"] = recipe.allocator.decide(model, tokens, scratch / "decision", plan.units)
            manifest.save()
        plan = plan.decided(manifest.facts["allocation"]["bits"])
    if recipe.cache and recipe.cache.scheme is None and "kv_cache" not in manifest.facts:
        tell("allocate", 0.0, f"measuring the caches of {plan.num_blocks} layers")
        manifest.facts["kv_cache"] = recipe.cache.decide(model, tokens, scratch / "decision")
        manifest.save()
    return plan, model


def _learned(
    plan: Plan, model: LazyModel, tokens: Tensor, scratch: Path, manifest: Manifest, tell: Progress
) -> LazyModel:
    """The model as a view shows it that has learned from calibration."""
    file = scratch / "learned.safetensors"
    if "rotation" not in manifest.facts:
        tell("rotate", 0.0, "learning a rotation")
        learned = plan.recipe.view.learn(model, tokens, scratch / "rotation", plan.quantized)
        save_file({"rotation": learned.rotation.cpu()}, file)
        manifest.facts["rotation"] = {
            "error_before": learned.before,
            "error_after": learned.after,
            "notes": list(learned.notes),
        }
        manifest.save()
    further = load_file(file)["rotation"]
    return LazyModel(plan.open_weights(further), dtype=model.dtype, device=str(model.device))
