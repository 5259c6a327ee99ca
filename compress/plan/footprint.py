"""How much memory a run takes: predicted from the plan, and measured."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from compress.calibrate import BATCH_TOKENS, FLOAT64_BELOW

Shape = tuple[int, int]

IMPORTS = 520 << 20
"""Resident memory of the interpreter with torch and transformers imported and warmed up, measured on Linux."""
HESSIANS = 2
"""The statistics, and the copy of them that is factorised."""
CROSS = 2
"""The moments across both streams, and what is made of them, where there are two."""
LEARNING = 4
"""Float32 copies of a block's weights while they are learned: offsets, gradients, old and new."""
GRADIENTS = 7
"""Times a batch is held by a block that gradients pass through: what it keeps for them, and they themselves."""
TRAINED = 6
"""Float32 copies of a model that is trained."""
COPIES = 5
"""Float32 copies of one layer's weight while it is quantized."""
SCORING_BYTES = 64 << 20
"""Float32 logits of one batch while scoring."""
LOGITS = 6
"""Times a batch of logits is held: both models, their log-probabilities, what is made of them, what malloc keeps."""


def peak_memory(
    block: Sequence[Shape],
    outside: Sequence[Shape],
    *,
    dtype: torch.dtype,
    tokens: int,
    calibrated: bool,
    scored: bool,
    two_streams: bool = False,
    learned: bool = False,
    differentiated: bool = False,
) -> int:
    """Predicted peak resident memory of a run in bytes: the largest phase on top of the imports.

    `dtype` is that of the computation. `block`, `outside`: shapes [out, in] of the linear layers of one block, and of
    embedding and head. `tokens`: in all calibration windows together. Walking holds one block in the compute dtype, its
    integer codes and their packed form, the widest layer's statistics with what their factorisation needs, and one
    batch on its way through the block; where weights are `learned`, their offsets and gradients as well. A block of a
    `differentiated` model keeps what gradients need; behind the last are embedding, head and logits.
    Scoring holds the largest part of a model in float32, and one batch of logits a few times over.
    """
    weights = sum(rows * columns for rows, columns in block)
    outer = [rows * columns for rows, columns in outside]
    columns = max(columns for _, columns in block)
    widest = max(rows * columns for rows, columns in block)
    stored = dtype.itemsize
    squares = HESSIANS + (CROSS if two_streams else 0)
    statistics = squares * columns**2 * (8 if columns < FLOAT64_BELOW else 4) if calibrated else 0
    batch = min(BATCH_TOKENS, tokens) * 4 * sum(rows for rows, _ in block)
    walking = weights * (stored + 2) + max(statistics, batch) + COPIES * 4 * widest
    if learned:
        walking += LEARNING * 4 * weights + 2 * batch
    passing = max(weights * stored + GRADIENTS * batch, stored * sum(outer) + LOGITS * SCORING_BYTES)
    scoring = 4 * max(weights, *outer, 0) + LOGITS * SCORING_BYTES if scored else 0
    return IMPORTS + max(walking, scoring, stored * sum(outer), passing if differentiated else 0)


def training_memory(parameters: int) -> int:
    """Predicted peak resident memory of training in bytes: weights, gradients, two moments and the best weights so far
    in float32, and the teacher."""
    return IMPORTS + TRAINED * 4 * parameters + LOGITS * SCORING_BYTES


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
