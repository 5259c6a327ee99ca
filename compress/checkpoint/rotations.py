"""Rotations that happen while the model runs, as compressed-tensors says them: `transform_config`.

A layer whose weights were multiplied by a Hadamard matrix wants its inputs multiplied by it too. One group for each
size names the layers, exactly. Rotations that were multiplied into weights for good need no word, and where others
mention them (`weight_input`, `weight_output`) nothing is left to do.

vLLM and `compress.load` apply what is said here; transformers 5.23 does not look at it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from compress.errors import ModelError

DONE = ("weight_input", "weight_output")
"""Locations of rotations that the stored weights have in them."""


def transform_config(size_by_layer: Mapping[str, int]) -> dict[str, Any]:
    """The entry for layers whose inputs are rotated by Sylvester's Hadamard matrices in runs of these sizes."""
    layers: dict[int, list[str]] = defaultdict(list)
    for name, size in size_by_layer.items():
        layers[size].append(name)
    groups = {
        f"R4_{size}": {
            "type": "hadamard",
            "apply": [{"targets": names, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
        for size, names in layers.items()
    }
    return {"config_groups": groups}


def rotated_inputs(config: Mapping[str, Any], layers: Collection[str]) -> dict[str, int]:
    """The inverse of `transform_config` for a model with these layers.

    Raises ModelError for rotations of another kind, or of anything but inputs.
    """
    where = "quantization_config.transform_config"
    sizes: dict[str, int] = {}
    for key, group in (config.get("config_groups") or {}).items():
        for step in group.get("apply", []):
            if step.get("location") in DONE:
                continue
            if step.get("location") != "input" or group.get("type") != "hadamard" or group.get("randomize"):
                raise ModelError(
                    f"{where}.{key}: {group.get('type')!r} at {step.get('location')!r} cannot be read, "
                    "only a fixed 'hadamard' of inputs"
                )
            size = group.get("head_dim")
            if not isinstance(size, int) or size < 1 or size & (size - 1):
                raise ModelError(f"{where}.{key}.head_dim: got {size!r}, expected a power of two")
            sizes |= dict.fromkeys(_targeted(layers, step), size)
    return sizes


def _targeted(layers: Iterable[str], step: Mapping[str, Any]) -> list[str]:
    def named(name: str, targets: Iterable[str]) -> bool:
        return any(
            re.match(target.removeprefix("re:"), name) if target.startswith("re:") else target in (name, "Linear")
            for target in targets
        )

    ignored = step.get("ignore") or []
    return [name for name in layers if named(name, step.get("targets") or []) and not named(name, ignored)]
