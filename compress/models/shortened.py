"""A model without some of its blocks: the same tensors under other numbers, and a config that says so.

What tells one block from another besides its weights is mostly a list in the config with an entry for each, such as
`layer_types`: those of the blocks that go are left out. Lists that transformers works out from a rule, "every sixth
attends to all tokens", are written down first, because the rule counts blocks. A family may know blocks by number in
ways that no list shows. So both models are built, without weights, and every block that stays is compared with what it
was; where it would turn into something else the model cannot be shortened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from torch import nn

from compress.errors import ModelError
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, canonical
from compress.models.store import LazyModel, Weights, read_config

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of their blocks."""
LEADING = ("max_window_layers",)
"""Settings that say how many blocks from the first on are of one kind."""
NUMBER = "layer_idx"
"""The attribute by which a module knows the number of its block, to find its place in the KV cache."""


def shortened(folder: Folder, anatomy: Anatomy, removed: Collection[int]) -> Folder:
    """The folder without the blocks of these numbers.

    Raises ModelError where the config does not say how many blocks there are, or where a block that stays would become
    another one under its new number.
    """
    count = next((folder.config[key] for key in COUNTS if isinstance(folder.config.get(key), int)), None)
    if count is None:
        raise ModelError(f"{folder.path / 'config.json'}: has none of {', '.join(COUNTS)}, so no block can be left out")
    kept = [number for number in range(count) if number not in removed]
    short = replace(
        folder, config=_config(folder, count, kept), tensors=dict(_renumbered(folder.tensors, anatomy, kept))
    )
    before, after = (LazyModel(Weights(each), dtype=torch.float32).blocks for each in (folder, short))
    for number, block in zip(kept, after, strict=True):
        was, becomes = _nature(before[number]), _nature(block)
        for key in sorted(was.keys() | becomes.keys()):
            if was.get(key) != becomes.get(key):
                raise ModelError(
                    f"{folder.path}: a {anatomy.family} model cannot be shortened: what a block does depends on its "
                    f"number. As the next one {anatomy.blocks}.{number} would have {key}={becomes.get(key)!r}, "
                    f"not {was.get(key)!r}"
                )
    return short


def blocks_of(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[dict[str, TensorHeader]]:
    """Of each block in order the tensors, by their names inside it. `tensors`: by module path."""
    found: dict[int, dict[str, TensorHeader]] = {}
    for path, header in tensors.items():
        if path.startswith(f"{anatomy.blocks}."):
            number, _, inside = path.removeprefix(f"{anatomy.blocks}.").partition(".")
            found.setdefault(int(number), {})[inside] = header
    return [found[number] for number in sorted(found)]


def _config(folder: Folder, count: int, kept: Collection[int]) -> dict[str, Any]:
    """The config with as many entries in each list of blocks as there are blocks."""
    config = dict(folder.config)
    full = type(read_config(folder.path)).from_dict(folder.config).to_dict()
    for key, value in full.items():
        if isinstance(value, list) and len(value) == count and "token" not in key:
            config[key] = [value[number] for number in kept]
    config |= {key: len(kept) for key in COUNTS if config.get(key) == count}
    return config | {key: sum(n < config[key] for n in kept) for key in LEADING if isinstance(config.get(key), int)}


def _renumbered(
    tensors: Mapping[str, TensorHeader], anatomy: Anatomy, kept: Collection[int]
) -> Iterator[tuple[str, TensorHeader]]:
    """Tensors by the names the file of the shortened model gives them."""
    place = {str(number): index for index, number in enumerate(kept)}
    for path, header in canonical(tensors, anatomy).items():
        number, _, inside = path.removeprefix(f"{anatomy.blocks}.").partition(".")
        if not path.startswith(f"{anatomy.blocks}."):
            yield header.name, header
        elif number in place:
            name = f"{header.name.removesuffix(f'{number}.{inside}')}{place[number]}.{inside}"
            yield name, replace(header, name=name)


def _nature(block: nn.Module) -> dict[str, object]:
    """What a block is apart from its weights and its number: classes and plain attributes of its modules."""
    found: dict[str, object] = {}
    for path, module in block.named_modules():
        found[path] = type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, (NoneType, bool, int, float, str)) and key != NUMBER:
                found[f"{path}.{key}".removeprefix(".")] = value
    return found
