#!/usr/bin/env python3
"""Give a model outliers that change nothing it computes: what transforms are for, in a model small enough for tests.

    scripts/plant_outliers.py MODEL OUT                        32 times, on 4 channels of every source
    scripts/plant_outliers.py MODEL OUT --kinds norm --factor 64 --channels 1

Small trained models have none of the large activations that make large ones hard to quantize. Here some channels of
whatever feeds a linear layer are multiplied by a factor, and the columns of the weights that read them divided by it:

    norm     a norm before attention or MLP     → q, k, v; gate, up
    up       the up-projection                  → down
    value    the value projection               → the output projection, all the query heads of the group

The factor is a power of two, so nothing is rounded: in float32 the logits are the same bit for bit. A tensor
that cannot hold its multiple is refused: one at the end of its dtype's range, a norm in bfloat16 that stores its
weight less one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import ModelError, NetsukeError, OutputError, RequestError
from compress.models.headers import read_folder
from compress.models.store import Weights, read_tensor

KIND_OF_ROLE = {"attn.v": "value", "mlp.up": "up"}
KINDS = ("norm", *KIND_OF_ROLE.values())


@dataclass(frozen=True)
class Planted:
    """Channels of one source that were multiplied, and where that was undone."""

    kind: str
    source: str
    layers: tuple[str, ...]
    channels: Tensor
    columns: Tensor
    """Inputs of the layers that these channels feed: several for each where heads share a value."""


@dataclass(frozen=True)
class Edit:
    """Entries of one tensor along one axis, multiplied. `offset` is what the module adds to the tensor first."""

    axis: int
    places: Tensor
    factor: float
    offset: float = 0.0

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """Raises ModelError where the result has no place in the tensor's dtype."""
        arithmetic = torch.promote_types(tensor.dtype, torch.float32)  # as the module does it
        before = tensor.index_select(self.axis, self.places).to(arithmetic) + self.offset
        after = (before * self.factor - self.offset).to(tensor.dtype)
        if not torch.equal((after.to(arithmetic) + self.offset) / self.factor, before):
            raise ModelError(
                f"{name}: {tensor.dtype} cannot hold {self.factor:g} times what it stands for. "
                "Take a --factor nearer to 1 or other --kinds, or store the model as float32"
            )
        return tensor.index_copy(self.axis, self.places, after)


def main() -> int:
    parser = argparse.ArgumentParser(description="Give a model outliers that change nothing it computes.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=float, default=32, help="a power of two (32)")
    parser.add_argument("--channels", type=int, default=4, help="channels of each source (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="all that the model has")
    options = parser.parse_args()
    try:
        planted = plant(**vars(options))
    except NetsukeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for each in planted:
        channels = " ".join(map(str, each.channels.tolist()))
        print(f"{each.kind:5}  {each.source} × {options.factor:g} on {channels}, undone in {', '.join(each.layers)}")
    return 0


def plant(
    model: Path, out: Path, *, factor: float = 32, channels: int = 4, seed: int = 0, kinds: Sequence[str] | None = None
) -> list[Planted]:
    """Write to `out` the model with outliers, and return what was planted. `kinds`: None for all that it can have."""
    if factor <= 0 or math.frexp(factor)[0] != 0.5:
        raise RequestError(f"--factor {factor:g}: is no power of two, so the logits would change. Take 16, 32 or 64")
    if channels < 1:
        raise RequestError(f"--channels {channels}: plants nothing. Take 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists already. Choose another folder")
    weights = Weights(read_folder(model))
    if "quantization_config" in weights.folder.config:
        raise ModelError(f"{model}: is quantized. Take the model it was made from")
    planted = choose(weights, channels, torch.Generator().manual_seed(seed))
    found = {each.kind for each in planted}
    if not found or not {*(kinds or found)} <= found:
        raise ModelError(
            f"{model}: what can be multiplied in {weights.anatomy.family} without changing the model is of kind "
            f"{' '.join(sorted(found)) or 'none'}, not {' '.join(kinds or KINDS)}"
        )
    planted = [each for each in planted if each.kind in (kinds or found)]
    write(weights, out, edits_for(weights, planted, factor))
    return planted


def choose(weights: Weights, count: int, generator: torch.Generator) -> list[Planted]:
    """For every source of every block, random channels."""
    anatomy = weights.anatomy
    planted = []
    for block in range(num_blocks(weights)):
        for site in anatomy.sites:
            source = f"{anatomy.blocks}.{block}.{site.source}"
            layers = tuple(f"{anatomy.blocks}.{block}.{name}" for name in site.layers)
            layers = tuple(name for name in layers if f"{name}.weight" in weights)
            if site.source is None or f"{source}.weight" not in weights or not layers:
                continue
            outputs = shape(weights, source)[0]
            channels = torch.randperm(outputs, generator=generator)[:count].sort().values
            columns = fed_by(channels, outputs, shape(weights, layers[0])[1], weights.folder.config)
            kind = KIND_OF_ROLE[anatomy.roles[site.source]] if site.source in anatomy.roles else "norm"
            planted.append(Planted(kind, source, layers, channels, columns))
    return planted


def num_blocks(weights: Weights) -> int:
    prefix = f"{weights.anatomy.blocks}."
    inside = (name.removeprefix(prefix) for name in weights.tensors if name.startswith(prefix))
    return 1 + max(int(name.partition(".")[0]) for name in inside)


def fed_by(channels: Tensor, outputs: int, inputs: int, config: Mapping[str, Any]) -> Tensor:
    """Which of a layer's inputs are these of its source's outputs. Grouped query heads read one value head each."""
    repeats = inputs // outputs
    if repeats == 1:
        return channels
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    by_copy = torch.arange(inputs).view(-1, repeats, head_dim).transpose(0, 1).reshape(repeats, outputs)
    return by_copy[:, channels].flatten()


def shape(weights: Weights, module: str) -> tuple[int, ...]:
    """[out, in] of a linear layer, however it is stored; [channels] of a norm."""
    stored = weights.tensors[f"{module}.weight"].shape
    return stored[::-1] if weights.anatomy.transposed else stored


def edits_for(weights: Weights, planted: Sequence[Planted], factor: float) -> dict[str, list[Edit]]:
    """Tensor name → what is to be done to it."""
    edits: dict[str, list[Edit]] = defaultdict(list)
    out_axis, in_axis = (1, 0) if weights.anatomy.transposed else (0, 1)
    for each in planted:
        is_norm = each.kind == "norm"
        offset = weights.anatomy.norm_offset if is_norm else 0.0
        edits[f"{each.source}.weight"].append(Edit(0 if is_norm else out_axis, each.channels, factor, offset))
        if f"{each.source}.bias" in weights:
            edits[f"{each.source}.bias"].append(Edit(0, each.channels, factor))
        for layer in each.layers:
            edits[f"{layer}.weight"].append(Edit(in_axis, each.columns, 1 / factor))
    return edits


def write(weights: Weights, out: Path, edits: Mapping[str, Sequence[Edit]]) -> None:
    """The folder again, file by file, with the edits made; it appears once it is whole."""
    folder = weights.folder
    path_of = {header.name: path for path, header in weights.tensors.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        for file in folder.files:
            tensors = {}
            for header in (header for header in folder.tensors.values() if header.file == file):
                tensor = read_tensor(header)
                for edit in edits.get(path_of.get(header.name, ""), ()):
                    tensor = edit.applied(header.name, tensor)
                tensors[header.name] = tensor
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
        for file in folder.path.iterdir():
            if file.is_file() and file not in folder.files:
                shutil.copyfile(file, partial / file.name)
        partial.replace(out)


if __name__ == "__main__":
    sys.exit(main())
