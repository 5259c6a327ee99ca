#!/usr/bin/env python3
"""Give a Llama a wider residual stream and more heads that change nothing it computes: zeros where there was nothing.

    scripts/pad_llama.py MODEL OUT --hidden 512

Some layouts want rows of a multiple of 256 weights, which small trained models do not have. RMSNorm divides by the root
of a mean, and a mean over more channels is smaller by their ratio: norms are multiplied by its root, and epsilon by it.
Heads grow with the hidden size, by whole heads in each group. Weights are stored in float32, in one file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.models.headers import read_folder
from compress.models.store import Weights


def padded(name: str, weight: Tensor, config: dict[str, Any], hidden: int, heads: int) -> Tensor:
    """A tensor of the wider model."""
    narrow, groups = config["hidden_size"], config["num_key_value_heads"]
    size = narrow // config["num_attention_heads"]
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


def wider(weight: Tensor, axis: int, size: int) -> Tensor:
    shape = list(weight.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([weight, weight.new_zeros(shape)], dim=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args()
    weights = Weights(read_folder(options.model))
    config = weights.folder.config
    narrow, groups = config["hidden_size"], config["num_key_value_heads"]
    size = narrow // config["num_attention_heads"]
    heads = options.hidden // size
    if config["model_type"] != "llama" or options.hidden < narrow or options.hidden % size or heads % groups:
        raise SystemExit(
            f"error: --hidden {options.hidden}: must be {narrow} or more, of heads of {size} in {groups} groups, "
            f"and the model a Llama, not a {config['model_type']}"
        )
    tensors = {
        name: padded(name, weights.read(name).float(), config, options.hidden, heads).contiguous()
        for name in weights.tensors
    }
    options.out.mkdir(parents=True)
    for file in options.model.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, options.out / file.name)
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    epsilon = config["rms_norm_eps"] * narrow / options.hidden
    changed = {"hidden_size": options.hidden, "num_attention_heads": heads, "head_dim": size, "rms_norm_eps": epsilon}
    (options.out / "config.json").write_text(json.dumps(config | changed | {"dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
