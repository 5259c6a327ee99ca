"""Layers in ggml's types by GPTQ: what `netsuke convert --calibration` adds to a conversion to GGUF.

The walk goes over the blocks as in a run: a layer is fitted to what its inputs are once the layers before it have been
(`compress.core.ggml_feedback`). What is found waits in files, a block of the model in each, until the file that
llama.cpp reads is written. Layers whose codes go into it as they are stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.data import calibration_windows, read_dataset
from compress.calibrate.walk import enter, inputs_of, walk
from compress.checkpoint.gguf import held
from compress.checkpoint.weights import open_model
from compress.core.ggml import Blocks, BlockType, type_for
from compress.core.ggml_feedback import fitted_blocks
from compress.errors import naming
from compress.models.headers import Folder, context_length
from compress.recipe import Calibration

CALIBRATION = Calibration(samples=128, sequence_length=512)
PARTS = ("codes", "scale", "shift", "scales", "mins")


def text_windows(folder: Folder, tokenizer: Any, dataset: str) -> Int[Tensor, "windows length"]:
    """What of a text layers are fitted to. Raises DataError where it is missing or too short."""
    options = CALIBRATION
    length = min(options.sequence_length, context_length(folder.config))
    documents = read_dataset(dataset, options.split, tokenizer)
    return calibration_windows(documents, tokenizer, samples=options.samples, length=length, seed=options.seed).tokens


def fit(
    path: Path,
    kind: str,
    windows: Int[Tensor, "windows length"],
    scratch: Path,
    tell: Callable[[str, float, str], None] = lambda *_: None,
) -> Mapping[str, Path]:
    """Layer → the file that `fitted` reads, of those layers that are not in type `kind` already. Made in `scratch`."""
    model = open_model(path)
    files: dict[str, Path] = {}

    def work(block: Block) -> None:
        tell("fit", block.index / len(model.blocks), model.block_name(block.index))
        found: dict[str, Tensor] = {}
        for site in block.sites:
            for name in site.layers:
                weight = block.weight(name)
                chosen = type_for(kind, weight.shape[1])
                if chosen is None or held(model.weights, name, chosen):
                    continue
                hessian = block.moments(site).hessian
                with naming(name):
                    made = fitted_blocks(weight, chosen, hessian)
                block.rewrite(name, made.dequantize())
                files[name] = scratch / f"{block.index}.safetensors"
                parts = {part: getattr(made, part) for part in PARTS}
                found |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        if found:
            save_file(
                {name: value.contiguous() for name, value in found.items()}, scratch / f"{block.index}.safetensors"
            )

    entrance = enter(model, windows, inputs_of(0, scratch))
    for _ in walk(model, entrance, entrance.inputs, scratch, work, packs=False):
        pass
    return files


def fitted(files: Mapping[str, Path], name: str, kind: BlockType) -> Blocks | None:
    """What was found for a layer, None where nothing was looked for."""
    if name not in files:
        return None
    with safe_open(files[name], "pt") as stored:
        names = set(stored.keys())
        parts = {part: stored.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in names}
    return Blocks(kind, **parts)
