"""Experts in files and in modules are the same numbers under two kinds of names."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from compress.models.experts import stacks, taken_apart
from compress.models.headers import Folder
from compress.models.store import Weights

mixtures_only = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"], indirect=True)


@mixtures_only
def test_a_stack_read_from_its_parts_is_the_parameter_and_comes_apart_into_them(
    headers: Folder, model: PreTrainedModel
) -> None:
    weights = Weights(headers)
    parameters = {name for name, _ in model.named_parameters() if ".experts." in name}
    assert weights.stacks.keys() == parameters
    assert parameters
    read = {name: weights.read(name) for name in parameters}
    for name, tensor in read.items():
        assert torch.equal(tensor, model.get_parameter(name))
        assert tensor.shape == weights.shape(name)
    parts = taken_apart(read, weights.stacks)
    assert parts.keys() == {name for name in weights.tensors if ".experts." in name}
    assert all(torch.equal(matrix, weights.read(name)) for name, matrix in parts.items())


def test_experts_are_stacked_by_number_and_gates_above_ups_whatever_the_order_of_names() -> None:
    names = [f"mlp.experts.{n}.{matrix}.weight" for n in (10, 9) for matrix in ("up_proj", "gate_proj", "norm")]
    expected = tuple((f"mlp.experts.{n}.gate_proj.weight", f"mlp.experts.{n}.up_proj.weight") for n in (9, 10))
    assert stacks([*names, "mlp.gate.weight"]) == {"mlp.experts.gate_up_proj": expected}
