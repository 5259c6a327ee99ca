"""The sites of one block, by the full names of their layers."""

from __future__ import annotations

from dataclasses import dataclass

from compress.models.store import LazyModel


@dataclass(frozen=True)
class BlockSite:
    """A `Site` of this very block: full layer names."""

    index: int
    layers: tuple[str, ...]
    roles: tuple[str, ...]
    source: str | None


def sites_of(model: LazyModel, block: int) -> tuple[BlockSite, ...]:
    """The sites that block number `block` has, in the order data passes them.

    One whose inputs are rotated on the way has no source: a scale folded there would meet other channels.
    """
    name, found = model.block_name(block), []
    present = dict(model.blocks[block].named_modules())
    for index, site in enumerate(model.anatomy.sites):
        layers = tuple(f"{name}.{layer}" for layer in site.layers if layer in present)
        roles = tuple(role for layer, role in site.roles.items() if layer in present)
        turned = any(layer in model.weights.online for layer in layers)
        source = f"{name}.{site.source}" if site.source and not turned else None
        if layers:
            found.append(BlockSite(index, layers, roles, source))
    return tuple(found)
