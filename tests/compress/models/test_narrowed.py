"""The law of narrower streams, on every family: where nothing is lost nothing changes, or none is made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.core.hadamard import random_rotation
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, read_folder
from compress.models.narrowed import (
    NarrowedWeights,
    fitting_multiple,
    narrowed,
    narrowing_obstacles,
    readers_of,
    stream_axes,
)
from compress.models.rotated import RotatedWeights, untied
from compress.models.store import LazyModel, Weights

CAN = [
    "gemma",
    "granite",
    "llama",
    "llama tied with biases",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
]
CANNOT = {
    "bert": "without a head",
    "bert trunk": "without a head",
    "llama trunk": "without a head",
    "gemma2": "scales what is added",
    "gemma3_text": "scales what is added",
    "olmo2": "through none",
    "olmo3": "through none",
    "opt post-norm": "through none",
    "gpt2": "ln_1 is a LayerNorm",
    "gpt_neox": "input_layernorm is a LayerNorm",
    "gpt_neox sequential": "input_layernorm is a LayerNorm",
    "opt": "layer_norm is a LayerNorm",
    "opt gelu": "layer_norm is a LayerNorm",
}
"""Families whose residual stream cannot be made narrower, and why."""
WIDTH, SIZE = 32, 24
KEEP = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))[:SIZE].sort().values
GONE = torch.tensor([each for each in range(WIDTH) if each not in KEEP])
TOLERANCE = 5e-6
"""Relative: transformers computes norms and softmax in float32 whatever the model's type, and ε of the norms of heads
has grown."""


def into_the_stream(model: PreTrainedModel, anatomy: Anatomy, weights: Weights) -> dict[str, Tensor]:
    """Parameters that write into the stream, its coordinates first."""
    state, (readers, axes) = (
        model.state_dict(),
        (readers_of(anatomy, weights.tensors), stream_axes(anatomy, weights.tensors)),
    )
    read = {anatomy.head, *readers, *(layer for layers in readers.values() for layer in layers)}
    return {name: state[name].movedim(axes[name], 0) for name in axes if name.rpartition(".")[0] not in read}


@pytest.fixture(scope="module")
def spare(family: str, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float64, with nothing in the coordinates that will go."""
    path = tmp_path_factory.mktemp(f"{family.replace(' ', '-')}-spare")
    doubled = copy.deepcopy(model).double()
    doubled.save_pretrained(path)
    weights = Weights(read_folder(path))
    for value in into_the_stream(doubled, weights.anatomy, weights).values():
        value[GONE] = 0
    doubled.save_pretrained(path)
    return path


def logits(weights: Weights, tokens: Tensor) -> Tensor:
    model = LazyModel(weights, dtype=torch.float64)
    with model.streamed():
        return model.module(input_ids=tokens, use_cache=False)[0]


def assert_same_function(before: Weights, after: Weights, tokens: Tensor) -> None:
    expected = logits(before, tokens)
    assert (logits(after, tokens) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def cut(folder: Folder, whole: Weights, keep: Tensor, **missing: tuple[Tensor, float]) -> NarrowedWeights:
    return NarrowedWeights(narrowed(folder, whole.anatomy, len(keep)), whole, keep, missing)


@pytest.mark.parametrize("family", CAN, indirect=True)
def test_what_is_empty_goes_without_loss(spare: Path, tokens: Tensor) -> None:
    whole = Weights(read_folder(spare))
    after = cut(whole.folder, whole, KEEP)
    assert_same_function(whole, after, tokens)
    assert after.shape(f"{whole.anatomy.embedding}.weight") == (128, SIZE)


@pytest.mark.parametrize("family", CAN, indirect=True)
def test_what_is_empty_after_a_turn_goes_without_loss(spare: Path, tokens: Tensor) -> None:
    plain = Weights(read_folder(spare))
    folder = untied(plain.folder, plain.anatomy, plain.tensors)
    order = torch.cat([KEEP, GONE])
    turned = random_rotation(WIDTH, torch.Generator().manual_seed(0)).apply(torch.eye(WIDTH, dtype=torch.float64))
    whole = RotatedWeights(folder, r2=False, further=turned.T[:, order])
    assert_same_function(plain, cut(folder, whole, torch.arange(SIZE)), tokens)


@pytest.mark.parametrize("family", ["llama", "gemma"], indirect=True)
def test_what_is_there_twice_goes_without_loss_where_readers_make_up_for_it(
    model: PreTrainedModel, tokens: Tensor, tmp_path: Path
) -> None:
    """Half of ‖x‖² goes with half of the coordinates, and behind a norm y_gone = w_gone / w_kept · y_kept."""
    half = WIDTH // 2
    doubled = copy.deepcopy(model).double()
    doubled.save_pretrained(tmp_path)
    weights = Weights(read_folder(tmp_path))
    for value in into_the_stream(doubled, weights.anatomy, weights).values():
        value[half:] = value[:half]
    doubled.config.rms_norm_eps = 1e-12  # which grows by n/k and not by s n/k
    if doubled.config.tie_word_embeddings:  # a tied head is not made up for
        doubled.config.tie_word_embeddings = False
        doubled.lm_head.weight = torch.nn.Parameter(torch.randn_like(doubled.lm_head.weight))
    doubled.save_pretrained(tmp_path)
    whole = Weights(read_folder(tmp_path))
    missing = {}
    for norm in readers_of(whole.anatomy, whole.tensors):
        weight = whole.read(f"{norm}.weight") + whole.anatomy.norm_offset
        missing[norm] = (weight[half:] / weight[:half]).diag(), 0.5
    assert_same_function(whole, cut(whole.folder, whole, torch.arange(half), **missing), tokens)


@pytest.mark.parametrize("family", CAN, indirect=True)
def test_all_coordinates_are_the_model_itself(folder: Path) -> None:
    whole = Weights(read_folder(folder))
    after = cut(whole.folder, whole, torch.arange(WIDTH))
    assert all(torch.equal(after.read(name), whole.read(name)) for name in whole.tensors)


def test_obstacles_are_known_from_headers_alone(family: str, folder: Path) -> None:
    weights = Weights(read_folder(folder))
    found = narrowing_obstacles(weights.anatomy, weights.tensors)
    assert bool(found) == (family not in CAN)
    assert CANNOT.get(family, "") in " ".join(found)


@pytest.mark.parametrize("family", CAN, indirect=True)
def test_transformers_takes_the_config(folder: Path, tmp_path: Path) -> None:
    """Heads keep their number and width, whatever the width of the stream."""
    whole = Weights(read_folder(folder))
    size = 3 * fitting_multiple(whole.folder, whole.anatomy, 1)
    after = narrowed(whole.folder, whole.anatomy, size)
    (tmp_path / "config.json").write_text(json.dumps(after.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            type(LazyModel(whole, dtype=torch.float32).config).from_pretrained(tmp_path)
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {header.name: header.shape for header in after.tensors.values()}.items() <= shapes.items()
