"""Coordinates count by how large they are behind norms; a principal basis keeps most of the stream in the fewest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core.channels import choose
from compress.core.residual import Activity, hidden_scores, norm_gain, principal_basis
from compress.core.stiefel import deviation
from compress.errors import NumericalError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(width: int = 24, tokens: int = 500, rank: int | None = None) -> Tensor:
    """Correlated; of `rank` dimensions where that is given."""
    rank = rank or width
    return normal(tokens, rank) * torch.logspace(1, -1, rank, dtype=torch.float64) @ normal(rank, width, seed=1)


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def rms_norm(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


# ---- Minitron ----------------------------------------------------------------------------------------------------


def test_scores_are_the_length_over_sequences_averaged_over_positions_and_summed_over_norms() -> None:
    outputs = [normal(6, 5, 8, seed=seed) for seed in range(3)]
    expected = sum(y.norm(dim=0).mean(dim=0) for y in outputs)
    assert_close(hidden_scores([Activity.of(y) for y in outputs]), expected)


def test_batches_add_up_to_what_they_are_together() -> None:
    y = normal(7, 5, 8)
    parts = Activity.of(y[:2]).including(y[2:3]).including(y[3:])
    assert parts.num_sequences == 7
    assert_close(parts.squares, Activity.of(y).squares)


def test_one_position_that_is_large_in_all_sequences_does_not_decide() -> None:
    """Squares are summed over sequences only: a first token of huge coordinates is one position of many."""
    y = torch.ones(16, 100, 2, dtype=torch.float64)
    y[:, :, 0] *= 2
    y[:, 0, 1] = 50
    scores = hidden_scores([Activity.of(y)])
    assert scores[0] > scores[1]
    assert y[..., 0].norm() < y[..., 1].norm()


def test_the_sign_of_a_coordinate_does_not_matter_and_its_scale_does() -> None:
    y = normal(6, 5, 8)
    factor = torch.tensor([1.0, -1, 2, -2, 0, 1, 1, 1], dtype=torch.float64)
    assert_close(hidden_scores([Activity.of(y * factor)]), hidden_scores([Activity.of(y)]) * factor.abs())


def test_sequences_that_are_not_finite_are_left_out_and_counted() -> None:
    y = normal(4, 5, 8).bfloat16()
    y[1, 2, 3] = torch.inf
    activity = Activity.of(y).including(y[1:2])
    assert (activity.num_sequences, activity.num_dropped) == (3, 2)
    assert_close(activity.squares, Activity.of(y[[0, 2, 3]]).squares)
    with pytest.raises(NumericalError, match="norm 1 of 2: no usable sequence; 1 held NaN"):
        hidden_scores([activity, Activity.of(y[1:2])])


def test_sequences_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences \[4, 8\] among sequences \[5, 8\]"):
        Activity.of(normal(2, 5, 8)).including(normal(2, 4, 8))


# ---- SliceGPT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 17, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_is_orthogonal_and_its_energies_are_those_of_the_turned_stream(size: int, dtype: torch.dtype) -> None:
    M = gram(stream(size)).to(dtype)
    Q, energy = principal_basis(M)
    assert Q.dtype == energy.dtype == torch.float64
    assert deviation(Q) < 1e-12
    assert torch.equal(energy, energy.sort(descending=True).values)
    assert_close(Q.T @ M.double() @ Q, energy.diag(), atol=1e-5 * float(energy[0]), rtol=0)


@pytest.mark.parametrize("kept", [1, 5, 23])
def test_no_other_space_of_its_size_keeps_more_energy(kept: int) -> None:
    M = gram(stream())
    Q, energy = principal_basis(M)
    for seed in range(50):
        tilted = Q[:, :kept] + 10.0 ** -(seed % 4) * normal(24, kept, seed=seed)
        other = torch.linalg.qr(tilted).Q
        assert float((other.T @ M @ other).trace()) < float(energy[:kept].sum()) * (1 + 1e-12)
    assert float(energy[:kept].sum()) > float(M.diagonal().topk(kept).values.sum())


def test_the_leading_columns_span_a_stream_of_few_dimensions() -> None:
    x = stream(24, rank=7)
    Q, energy = principal_basis(gram(x))
    assert_close(x @ Q[:, :7] @ Q[:, :7].T, x, atol=1e-10, rtol=0)
    assert energy[7:].max() < 1e-10 * energy[0]


def test_turning_the_stream_turns_its_basis() -> None:
    x, R = stream(), torch.linalg.qr(normal(24, 24, seed=3)).Q
    first, energy = principal_basis(gram(x))
    second, same = principal_basis(gram(x @ R))
    assert_close(same, energy)
    overlap = (R @ second).T @ first
    assert_close(overlap.abs(), torch.eye(24, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_basis_is_the_same_every_time_and_its_columns_point_one_way() -> None:
    M = gram(stream())
    Q, _ = principal_basis(M)
    assert torch.equal(Q, principal_basis(M.clone())[0])
    assert (Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("M", [torch.zeros(6, 6), torch.eye(6), torch.ones(6, 6)], ids=["zero", "eye", "ones"])
def test_a_moment_with_equal_energies_has_a_basis_too(M: Tensor) -> None:
    Q, energy = principal_basis(M)
    assert deviation(Q) < 1e-12
    assert (energy >= 0).all()
    assert float(energy.sum()) == pytest.approx(float(M.trace()))


def test_a_moment_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="1 of 36 numbers of the moment are not finite"):
        principal_basis(torch.tensor([1, 1, torch.nan, 1, 1, 1]).diag_embed().nan_to_num(nan=torch.inf))


def test_a_residual_network_whose_stream_has_few_dimensions_is_sliced_without_loss() -> None:
    """Two layers behind norms; everything is written into the space that the embeddings span."""
    x, kept = stream(24, rank=9), 9
    space = normal(9, 24, seed=1)
    into = [normal(24, 16, seed=seed) for seed in (4, 5)]
    out = [normal(16, 9, seed=seed) @ space for seed in (6, 7)]

    def network(x: Tensor, into: list[Tensor], out: list[Tensor], gain: float) -> tuple[Tensor, Tensor]:
        moment = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        for reads, writes in zip(into, out, strict=True):
            y = gain * rms_norm(x)
            moment += gram(y)
            x = x + (y @ reads).tanh() @ writes
        return gain * rms_norm(x), moment

    whole, moment = network(x, into, out, 1.0)
    Q = principal_basis(moment)[0][:, :kept]
    sliced, _ = network(x @ Q, [Q.T @ each for each in into], [each @ Q for each in out], norm_gain(24, kept))
    assert_close(sliced @ Q.T, whole, atol=1e-9, rtol=0)


def test_in_a_trained_model_a_basis_keeps_more_than_the_best_coordinates(assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    lines = (assets / "data/calibration.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = tokenizer(texts, return_tensors="pt", truncation=True, max_length=96)["input_ids"]
    outputs: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda module, _, y: outputs.append((y / module.weight).detach().double()))
    with torch.no_grad():
        model(tokens)
    assert len(outputs) == 11
    calibration, held_out = (torch.cat([y[part].flatten(0, 1) for y in outputs]) for part in (slice(4), slice(4, 8)))
    Q, _ = principal_basis(gram(calibration))
    coordinates = choose(hidden_scores([Activity.of(y[:4]) for y in outputs]), 48)
    turned = float((held_out @ Q[:, :48]).square().sum() / held_out.square().sum())
    plain = float(held_out[:, coordinates].square().sum() / held_out.square().sum())
    assert 1 - turned < 0.8 * (1 - plain)
    assert plain > 48 / 64
