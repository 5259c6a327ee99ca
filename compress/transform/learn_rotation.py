"""What R1 is learned from: the inputs of every site that reads the residual stream, and the weights behind them.

The model is walked once, as it is, a random Hadamard rotation in place. Of each site a batch of inputs stays in a file,
and weights are read when their turn comes, so memory holds one site. What is learned (`compress.core.learned_rotation`)
is a further rotation of those coordinates, and starts as none.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, inputs_of, walk
from compress.core.learned_rotation import Learned, Site, learn
from compress.core.scheme import Grid
from compress.models.rotated import READERS, has_rms_norms
from compress.models.store import LazyModel


def learn_rotation(
    model: LazyModel,
    tokens: Int[Tensor, "windows length"],
    scratch: Path,
    inputs: Mapping[str, Grid],
    *,
    steps: int,
    seed: int,
) -> Learned:
    """A rotation to follow the one that `model` is under already.

    `inputs`: layer → what its inputs will be rounded to; sites without any do not count, and of several grids the
    first one stands for all. `scratch`: a folder to be made and removed. Raises NumericalError where a site's inputs or
    weights are not finite.
    """
    sites: list[Site] = []
    grids: list[Grid] = []

    def work(block: Block) -> None:
        for site in block.sites:
            readers = [name for name, role in zip(site.layers, site.roles, strict=True) if role in READERS]
            rounded = [inputs[name] for name in readers if name in inputs]
            if rounded:
                file = scratch / f"site-{len(sites)}.safetensors"
                save_file({"inputs": block.sample(site).cpu()}, file)
                sites.append(partial(_load, file, readers, model))
                grids.append(rounded[0])

    width = model.weights.tensors[f"{model.anatomy.embedding}.weight"].shape[-1]
    start = torch.eye(width, dtype=torch.float64, device=model.device)
    centred = not has_rms_norms(model.weights.folder.config)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        entrance = enter(model, tokens, inputs_of(0, scratch))
        for _ in walk(model, entrance, entrance.inputs, scratch, work):
            pass
        return learn(start, sites, grids[0], steps=steps, seed=seed, centred=centred)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load(
    file: Path, layers: Sequence[str], model: LazyModel
) -> tuple[Float[Tensor, "tokens n"], Float[Tensor, "out n"]]:
    """What was kept of a site's inputs, and the weights of its layers, one below another."""
    stored = [model.weights.read(f"{name}.weight").to(model.device, torch.float32) for name in layers]
    weights = [weight.T if model.anatomy.transposed else weight for weight in stored]
    return load_file(file)["inputs"].to(model.device), torch.cat(weights)
