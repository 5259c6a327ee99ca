#!/usr/bin/env python3
"""Another Llama that computes the same: with more channels, zeros where there was nothing, or with its own reordered.

    scripts/equal_llama.py MODEL OUT [--hidden 512] [--shuffle SEED]

Some layouts want rows of a multiple of 256 weights, which small trained models do not have. RMSNorm divides by the root
of a mean, and a mean over more channels is smaller by their ratio: norms are multiplied by its root, and epsilon by it.
Heads grow with the hidden size, by whole heads in each group.

Rounding errors are those of one draw, and what they do to a perplexity is for the most part chance. The same model with
the channels of its residual stream, of its MLPs and of its values in another order is another draw. Weights are stored
in float32, in one file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.models.headers import read_folder
from compress.models.store import Weights

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
"""Modules whose columns, as those of norms, are channels of the residual stream; of all others they are rows."""


def shuffled(tensors: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """The same function, each tensor with its channels in another order."""
    generator = torch.Generator().manual_seed(seed)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    groups, repeats = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    size = head_size(config)
    stream = order(config["hidden_size"])
    inner = [order(config["intermediate_size"]) for _ in range(config["num_hidden_layers"])]
    values = [torch.stack([order(size) for _ in range(groups)]) for _ in range(config["num_hidden_layers"])]
    starts = size * torch.arange(groups * repeats).unsqueeze(1)
    found = {}
    for name, tensor in tensors.items():
        _, _, module = name.removesuffix(".weight").rpartition(".")
        block = int(name.split(".")[2]) if ".layers." in name else 0
        reads = module in READERS or tensor.dim() == 1
        moved = tensor[..., stream] if reads else tensor[stream]
        if module in ("gate_proj", "up_proj"):
            moved = moved[inner[block]]
        elif module == "down_proj":
            moved = moved[:, inner[block]]
        elif module == "v_proj":
            moved = moved[(values[block] + starts[:groups]).flatten()]
        elif module == "o_proj":
            moved = moved[:, (values[block].repeat_interleave(repeats, dim=0) + starts).flatten()]
        found[name] = moved
    return found


def padded(name: str, weight: Tensor, config: Mapping[str, Any], hidden: int, heads: int) -> Tensor:
    """A tensor of the wider model."""
    narrow, groups = config["hidden_size"], config["num_key_value_heads"]
    size = head_size(config)
    module = name.removesuffix(".weight").rpartition(".")[2]
    if weight.dim() == 1:
        return wider(weight * (narrow / hidden) ** 0.5, 0, hidden)
    if module == "q_proj":
        rows = wider(weight.view(groups, -1, size, narrow), 1, heads // groups)
        return wider(rows.flatten(0, 2), 1, hidden)
    if module == "o_proj":
        columns = wider(weight.view(narrow, groups, -1, size), 2, heads // groups)
        return wider(columns.flatten(1), 0, hidden)
    return wider(weight, 0 if module == "down_proj" else 1, hidden)


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def wider(weight: Tensor, axis: int, size: int) -> Tensor:
    shape = list(weight.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([weight, weight.new_zeros(shape)], dim=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, help="default: as it is")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="default: channels stay in their order")
    options = parser.parse_args()
    weights = Weights(read_folder(options.model))
    config = weights.folder.config
    narrow, groups = config["hidden_size"], config["num_key_value_heads"]
    size = head_size(config)
    hidden = options.hidden or narrow
    heads = hidden // size
    if narrow != size * config["num_attention_heads"] or any(name.endswith(".bias") for name in weights.tensors):
        raise SystemExit(
            "error: a Llama with biases, or whose heads are not as wide together as its stream, stays as it is"
        )
    if config["model_type"] != "llama" or hidden < narrow or hidden % size or heads % groups:
        raise SystemExit(
            f"error: --hidden {hidden}: must be {narrow} or more, of heads of {size} in {groups} groups, "
            f"and the model a Llama, not a {config['model_type']}"
        )
    tensors = {name: weights.read(name).float() for name in weights.tensors}
    if options.shuffle is not None:
        tensors = shuffled(tensors, config, options.shuffle)
    tensors = {name: padded(name, tensor, config, hidden, heads).contiguous() for name, tensor in tensors.items()}
    options.out.mkdir(parents=True)
    for file in options.model.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, options.out / file.name)
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    epsilon = config["rms_norm_eps"] * narrow / hidden
    changed = {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": size, "rms_norm_eps": epsilon}
    (options.out / "config.json").write_text(json.dumps(config | changed | {"dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
