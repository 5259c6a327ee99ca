"""How much memory a run takes: predicted from the plan, and measured."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from compress.models.headers import tensor_bytes

if TYPE_CHECKING:
    from compress.plan import Plan

IMPORTS = 520 << 20
"""Resident memory of the interpreter with torch and transformers imported and warmed up, measured on Linux."""
BATCH_TOKENS = 4096
"""Tokens in one batch of the walk."""
WIDE = 8192
"""Columns from which on statistics are kept in float32."""
HESSIANS = 3
"""Copies of the statistics while they are factorised."""
COPIES = 5
"""Float32 copies of one layer's weight while it is quantized."""
SCORING_BYTES = 64 << 20
"""Float32 logits of one batch while scoring."""
LOGITS = 5
"""Times a batch of logits is held: both models, their log-probabilities, what is made of them."""


def peak_memory(plan: Plan) -> int:
    """Predicted peak resident memory of a run in bytes: the largest phase on top of the imports.

    Walking: one block in the compute dtype, its integer codes and their packed form, the widest site's statistics
    with what their factorisation needs, one batch on its way through the block. Scoring: the largest part of a
    model in float32, and one batch of logits a few times over.
    """
    inside = [layer for layer in plan.layers if layer.block == 0]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in inside)
    outer = [layer.shape[0] * layer.shape[1] for layer in plan.layers if layer.block is None]
    columns = max(layer.shape[1] for layer in inside)
    widest = max(layer.shape[0] * layer.shape[1] for layer in inside)
    stored = tensor_bytes(plan.layers[0].dtype, (1,))
    calibrated = any(stage.calibrated for stage in plan.recipe.stages)
    tokens = min(BATCH_TOKENS, plan.windows * plan.sequence_length)
    statistics = HESSIANS * columns**2 * (8 if columns < WIDE else 4) if calibrated else 0
    batch = tokens * 4 * sum(layer.shape[0] for layer in inside)
    walking = weights * (stored + 2) + max(statistics, batch) + COPIES * 4 * widest
    scoring = 4 * max(weights, *outer) + LOGITS * SCORING_BYTES if plan.anatomy.head else 0
    writing = stored * sum(outer)
    return IMPORTS + max(walking, scoring, writing)


def memory_now() -> int:
    """Resident memory of this process in bytes; its peak where the system does not say."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_so_far()


def peak_memory_so_far() -> int:
    """The largest resident memory of this process so far, in bytes.

    Linux says it in /proc; `getrusage` may count what the process that started this one held.
    """
    try:
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    found = {"python": platform.python_version()}
    for name in ("netsuke", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
