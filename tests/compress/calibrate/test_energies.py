"""Input energies: the diagonal of the second moments, of a whole model at once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.calibrate.energies import input_energies
from compress.calibrate.observers import MomentsObserver
from compress.errors import NumericalError
from compress.models.store import LazyModel


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 250, (10, 16), generator=torch.Generator().manual_seed(0))


def test_they_are_the_diagonal_of_what_observers_measure(tiny: Path, windows: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    observer = MomentsObserver(layer.in_features)
    layer.register_forward_pre_hook(lambda _, args: observer.update(args[0]))
    with torch.no_grad():
        model(windows)
    found = input_energies(LazyModel.open(tiny), windows)
    measured = observer.result(windows.numel(), "down_proj").hessian.diagonal()
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], measured, rtol=1e-5, atol=1e-9)


def test_every_layer_of_the_blocks_has_some_and_the_head_has_none(tiny: Path, windows: Tensor) -> None:
    model = LazyModel.open(tiny)
    linear = {name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)}
    assert input_energies(model, windows).keys() == {name for name in linear if name.startswith("model.layers.")}


def test_a_model_that_overflows_is_named_by_its_layer(
    tiny: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LazyModel.open(tiny)
    read = model.weights.read

    def damaged(name: str) -> Tensor:
        return read(name) * (torch.inf if name == "model.layers.0.mlp.up_proj.weight" else 1)

    monkeypatch.setattr(model.weights, "read", damaged)
    with pytest.raises(NumericalError, match="model.layers.0.mlp.down_proj"):
        input_energies(model, windows)
