"""The law of rotations, on every family: in other coordinates the model computes the same function, or none is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from compress.core.hadamard import random_rotation
from compress.models.headers import read_folder
from compress.models.rotated import RotatedWeights, obstacles, untied
from compress.models.store import LazyModel, Weights

CANNOT = {
    "bert": "without a head",
    "bert trunk": "without a head",
    "llama trunk": "without a head",
    "gemma2": "post_.*_layernorm scales what is added",
    "gemma3_text": "post_.*_layernorm scales what is added",
    "mixtral": "experts and their router read the residual stream",
    "olmo2": "through none",
    "olmo3": "through none",
    "opt post-norm": "through none",
    "qwen3_moe": "experts and their router read the residual stream",
}
"""Families whose residual stream cannot be turned without changing the function, and why."""
TOLERANCE = 2e-6
"""Relative: transformers computes norms and softmax in float32 whatever the model's type."""


@pytest.fixture(scope="module")
def doubled(family: str, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float64, so that rotating it rounds nothing that shows."""
    path = tmp_path_factory.mktemp(f"{family.replace(' ', '-')}-double")
    dtype = model.dtype
    model.double().save_pretrained(path)
    model.to(dtype)
    return path


def rotated(path: Path, *, r1: bool = False, r2: bool = False, r4: bool = False) -> RotatedWeights:
    plain = Weights(read_folder(path))
    return RotatedWeights(untied(plain.folder, plain.anatomy, plain.tensors), r1=r1, r2=r2, r4=r4)


def logits(weights: Weights, tokens: Tensor) -> Tensor:
    model = LazyModel(weights, dtype=torch.float64)
    model.config._experts_implementation = "eager"  # the quick one multiplies no float64
    with model.streamed():
        return model.module(input_ids=tokens, use_cache=False)[0]


def assert_same_function(path: Path, weights: Weights, tokens: Tensor) -> None:
    expected = logits(Weights(read_folder(path)), tokens)
    assert (logits(weights, tokens) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_r1_keeps_the_function_of_every_family_or_says_why_it_cannot(
    family: str, doubled: Path, tokens: Tensor
) -> None:
    if family in CANNOT:
        with pytest.raises(ValueError, match=CANNOT[family]):
            rotated(doubled, r1=True)
    else:
        assert_same_function(doubled, rotated(doubled, r1=True), tokens)


@pytest.mark.parametrize("which", ["r2", "r4"])
def test_r2_and_r4_keep_the_function_of_every_family(doubled: Path, tokens: Tensor, which: str) -> None:
    if Weights(read_folder(doubled)).anatomy.head is None:
        pytest.skip("no logits to compare; the law is that of the families with a head")
    assert_same_function(doubled, rotated(doubled, **{which: True}), tokens)


def test_all_rotations_together_keep_the_function(family: str, doubled: Path, tokens: Tensor) -> None:
    if family in CANNOT:
        pytest.skip("R1 is impossible here")
    assert_same_function(doubled, rotated(doubled, r1=True, r2=True, r4=True), tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_r1_may_go_on_by_any_rotation_that_keeps_means_where_norms_need_that(
    family: str, doubled: Path, tokens: Tensor
) -> None:
    plain = Weights(read_folder(doubled))
    folder = untied(plain.folder, plain.anatomy, plain.tensors)
    width = plain.tensors[f"{plain.anatomy.embedding}.weight"].shape[-1]
    further = random_rotation(width, torch.Generator().manual_seed(5), centred=family == "gpt2")
    matrix = further.apply(torch.eye(width, dtype=torch.float64))
    assert_same_function(doubled, RotatedWeights(folder, further=matrix), tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_a_rotation_really_changes_the_weights_it_turns(doubled: Path) -> None:
    weights = rotated(doubled, r1=True, r2=True, r4=True)
    plain = Weights(read_folder(doubled))
    turned = {name for name in plain.tensors if not torch.equal(weights.read(name), plain.read(name))}
    matrices = {name for name, header in plain.tensors.items() if len(header.shape) == 2}
    assert matrices <= turned


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_after_r1_every_norm_of_the_stream_has_weight_one(doubled: Path) -> None:
    weights = rotated(doubled, r1=True)
    norms = [name for name in weights.tensors if "norm" in name]
    assert norms
    assert all(weights.read(name).eq(1).all() for name in norms)


@pytest.mark.parametrize("family", ["llama tied with biases"], indirect=True)
def test_a_tied_head_gets_a_weight_of_its_own(doubled: Path) -> None:
    weights = rotated(doubled, r1=True)
    assert weights.folder.config["tie_word_embeddings"] is False
    head, embedding = weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")
    assert head.shape == embedding.shape
    assert not torch.equal(head, embedding)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_seed_decides_the_rotation(doubled: Path) -> None:
    plain = Weights(read_folder(doubled))
    folder = untied(plain.folder, plain.anatomy, plain.tensors)
    name = "model.embed_tokens.weight"
    first, again, other = (RotatedWeights(folder, seed=seed).read(name) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_rotated_tensors_keep_type_and_size(doubled: Path) -> None:
    weights = rotated(doubled, r1=True, r2=True, r4=True)
    for name, header in weights.tensors.items():
        tensor = weights.read(name)
        assert tensor.shape == header.shape
        assert_close(tensor.norm() > 0, torch.tensor(True))
        assert tensor.dtype == weights.dtype(name)


def test_obstacles_are_known_from_headers_alone(family: str, doubled: Path) -> None:
    weights = Weights(read_folder(doubled))
    assert bool(obstacles(weights.anatomy, weights.tensors)) == (family in CANNOT)
