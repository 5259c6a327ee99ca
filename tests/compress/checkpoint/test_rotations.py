"""What config.json says of rotated inputs, and compressed-tensors' own reading of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from compress.checkpoint.rotations import rotated_inputs, transform_config
from compress.core.hadamard import hadamard
from compress.errors import ModelError

SIZES = {"model.layers.0.mlp.down_proj": 64, "model.layers.1.mlp.down_proj": 64, "model.layers.2.mlp.down_proj": 4}
LAYERS = [*SIZES, "model.layers.0.mlp.up_proj"]


def group(**changes: Any) -> dict[str, Any]:
    step = {"targets": ["re:.*down_proj"], "location": "input"} | changes.pop("step", {})
    return {"config_groups": {"R4": {"type": "hadamard", "apply": [step], "head_dim": 32} | changes}}


def test_what_is_written_is_read_back() -> None:
    assert rotated_inputs(json.loads(json.dumps(transform_config(SIZES))), LAYERS) == SIZES


def test_without_rotations_there_is_nothing_to_do() -> None:
    assert rotated_inputs({}, LAYERS) == {}


def test_patterns_and_exceptions_of_others_are_followed() -> None:
    config = group(step={"ignore": ["model.layers.2.mlp.down_proj"]})
    assert rotated_inputs(config, LAYERS) == dict.fromkeys(LAYERS[:2], 32)


@pytest.mark.parametrize("location", ["weight_input", "weight_output"])
def test_rotations_within_the_weights_need_nothing(location: str) -> None:
    assert rotated_inputs(group(step={"location": location}), LAYERS) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (group(type="random-hadamard"), "'random-hadamard' at 'input'"),
        (group(randomize=True), "only a fixed 'hadamard'"),
        (group(step={"location": "k_cache"}), "'hadamard' at 'k_cache'"),
        (group(head_dim=None), "head_dim: got None, expected a power of two"),
        (group(head_dim=12), "head_dim: got 12, expected a power of two"),
    ],
)
def test_other_rotations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rotated_inputs(config, LAYERS)


def test_compressed_tensors_rotates_inputs_as_we_do() -> None:
    transform = pytest.importorskip("compressed_tensors.transform")
    config = transform.TransformConfig.model_validate(transform_config({"down_proj": 16}))
    model = nn.Sequential()
    model.add_module("down_proj", nn.Linear(48, 5))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = model.down_proj(hadamard(x, 16))
    transform.apply_transform_config(model, config)
    assert_close(model(x), expected)
