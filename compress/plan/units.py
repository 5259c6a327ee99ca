"""Units: what an allocator chooses for, and how its choice becomes schemes.

Layers that a serving engine runs as one matrix must have one grid, so they are one unit; every other layer is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.checkpoint import Format
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.headers import tensor_bytes
from compress.stage import Unit


def units_of(
    choices: Sequence[int],
    anatomy: Anatomy,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    types: Mapping[str, str],
    form: Format,
) -> list[Unit]:
    """The layers of `schemes`, with their scheme and bytes for each choice of bits."""
    fused = {layer: index for index, site in enumerate(anatomy.sites) if site.fused for layer in site.layers}
    groups: dict[object, list[str]] = {}
    for name in schemes:
        block, _, local = name.removeprefix(f"{anatomy.blocks}.").partition(".")
        groups.setdefault((block, fused.get(local, local)), []).append(name)
    units = []
    for names in groups.values():
        given = schemes[names[0]]
        offered = tuple(replace(given, weights=replace(given.weights, bits=bits)) for bits in sorted(choices))
        sizes = [
            sum(
                tensor_bytes(*entry)
                for name in names
                for entry in form.layout(name, shapes[name], scheme, types[name]).values()
            )
            for scheme in offered
        ]
        weights = sum(shapes[name][0] * shapes[name][1] for name in names)
        units.append(Unit(tuple(names), offered, tuple(sizes), weights))
    return units


def allotted(budget: int, units: Sequence[Unit], bits: Mapping[str, int] | None) -> dict[str, Scheme]:
    """Layer → its scheme by what was decided; before that, by the largest choice that all can have."""
    num_choices = len(units[0].schemes) if units else 0
    fitting = [choice for choice in range(num_choices) if sum(unit.bytes[choice] for unit in units) <= budget]
    schemes = {}
    for unit in units:
        for layer in unit.layers:
            by_bits = {scheme.weights.bits: scheme for scheme in unit.schemes}
            schemes[layer] = by_bits[bits[layer]] if bits else unit.schemes[max(fitting, default=0)]
    return schemes
