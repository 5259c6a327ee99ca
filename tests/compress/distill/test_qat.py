from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress.checkpoint.weights import QuantizedWeights
from compress.core.scheme import parse_scheme
from compress.distill.objective import Objective
from compress.distill.qat import QAT, LearnedLinear
from compress.distill.train import Training
from compress.models.headers import read_folder
from compress.recipe import Calibration, Evaluation, Recipe

TRAINING = Training(tokens=1024, batch_size=4, learning_rate=2e-3, evaluate_every=4, checkpoint_every=100)


def trained(model: Path, text: Path, output: Path, stage: QAT) -> dict[str, object]:
    calibration = Calibration(dataset=str(text), samples=2, sequence_length=32)
    recipe = Recipe("qat", (stage,), calibration=calibration, evaluation=Evaluation(samples=2))
    return compress.run(recipe, model=str(model), output=output)


@pytest.mark.parametrize(("scheme", "symmetric"), [("w2a16", False), ("w3a16", True), ("w8a16", True)])
def test_what_is_exported_is_what_was_trained(
    scheme: str, symmetric: bool, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[torch.Tensor] = []

    class Watched(LearnedLinear):
        """Keeps the weight of each forward pass."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                passes.append(super().forward(torch.eye(self.weight.shape[1])).T)
            return super().forward(x)

    monkeypatch.setattr("compress.distill.qat.LearnedLinear", Watched)
    report = trained(tiny, text, tmp_path / "out", QAT(scheme, 32, symmetric, training=TRAINING))
    best_step = report["segments"][0]["best_step"]  # type: ignore[index]
    assert best_step > 0 or scheme == "w8a16"  # eight bits are as good as the original to begin with
    folder = QuantizedWeights(read_folder(tmp_path / "out"))
    assert len(folder.schemes) == 21
    for name in folder.schemes:
        exported = folder.read(f"{name}.weight")
        assert any(torch.equal(exported, weight) for weight in passes if weight.shape == exported.shape)


def test_codes_and_steps_learn() -> None:
    torch.manual_seed(0)
    layer = LearnedLinear(nn.Linear(32, 8), parse_scheme("w3a16", 16, True), "mse", torch.float32)
    layer(torch.randn(4, 32)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()
    assert layer.log_scale.grad is not None
    assert layer.log_scale.grad.any()


def test_rounded_inputs_are_rounded_in_training() -> None:
    torch.manual_seed(0)
    plain = LearnedLinear(nn.Linear(32, 8), parse_scheme("w8a16", None, True), "mse", torch.float32)
    torch.manual_seed(0)
    both = LearnedLinear(nn.Linear(32, 8), parse_scheme("w8a8", None, True), "mse", torch.float32)
    x = torch.randn(4, 32, requires_grad=True)
    assert not torch.equal(plain(x), both(x))
    both(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "nvfp4"}, "steps are learned for integer weights"),
        ({"scheme": "w4a16", "range": "importance"}, "must be mse or minmax"),
        ({"scheme": "w4a16", "training": Training(lora_rank=4)}, "the weights themselves are trained"),
    ],
)
def test_what_cannot_be_learned_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QAT(**options)  # type: ignore[arg-type]


def test_it_quantizes_the_layers_it_names(tiny: Path, text: Path, tmp_path: Path) -> None:
    stage = QAT("w4a16", 32, layers=("mlp",), ignore=("mlp.down",), objective=Objective(), training=TRAINING)
    trained(tiny, text, tmp_path / "out", stage)
    schemes = QuantizedWeights(read_folder(tmp_path / "out")).schemes
    assert {name.rpartition(".")[2] for name in schemes} == {"gate_proj", "up_proj"}
