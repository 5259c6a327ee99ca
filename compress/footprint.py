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

IMPORTS = 430 << 20
"""Resident memory of the interpreter with torch and transformers imported and warmed up, measured on Linux."""
BATCH_TOKENS = 4096
SCORING_BYTES = 64 << 20


def peak_memory(plan: Plan) -> int:
    """Predicted peak resident memory of a run in bytes: the largest phase on top of the imports.

    One block in the compute dtype, the widest site's statistics with what their factorisation needs, one batch on
    its way through the block; or, while scoring, one batch of logits with the embedding and the head.
    """
    raise NotImplementedError


def memory_now() -> int:
    """Resident memory of this process in bytes; its peak where the system does not say."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_so_far()


def peak_memory_so_far() -> int:
    """The largest resident memory of this process so far, in bytes."""
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
