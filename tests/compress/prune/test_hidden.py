"""The stage `hidden`: what does not matter goes without loss, and the folder loads anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compress
from compress.errors import RecipeError
from compress.models.headers import read_folder
from compress.models.store import LazyModel, Weights
from compress.pipeline import prepare
from compress.prune.hidden import Hidden, explained
from compress.recipe import parse

SMALL = [
    "calibration.samples=8",
    "calibration.sequence_length=48",
    "evaluation.samples=4",
    "evaluation.sequence_length=64",
]
TOKENS = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(1))


def recipe(stage: str) -> Any:
    return parse(f"stages: [{stage}]", "x.yaml")


def run(model: Path, text: Path, output: Path, stage: str) -> dict[str, Any]:
    return compress.run(recipe(stage), model=str(model), output=output, calibration=str(text), overrides=SMALL)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def cut(model: Path, stage: Hidden, scratch: Path, tokens: Tensor = TOKENS) -> tuple[LazyModel, dict[str, Any]]:
    """The model as the stage shows it once it has learned, and what it says of it."""
    plain = Weights(read_folder(model))
    folder = stage.folder(plain.folder, plain.anatomy, plain.tensors)
    learned = stage.learn(LazyModel(stage.weights(folder), dtype=torch.float32), tokens, scratch, {})
    assert not scratch.exists()
    return LazyModel(stage.weights(folder, learned.tensors), dtype=torch.float32), learned.facts


def saved(tiny: Path, folder: Path, space: Tensor, **settings: Any) -> Path:
    """A random Llama in float32 with biases, whose blocks and embeddings write into a part of the stream only.

    `space`: the projection on that part.
    """
    torch.manual_seed(5)
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True} | settings
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, **options)).float().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter += 0.1 * torch.randn_like(parameter)
        if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")):
            parameter.copy_(space @ parameter)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(parameter @ space)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    model.save_pretrained(folder)
    return folder


def assert_same_function(expected: Tensor, found: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("method", ["activity", "pca"])
def test_all_coordinates_are_the_same_function(method: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "model", torch.eye(64))
    run(model, text, tmp_path / "out", f"hidden: {{keep: 1.0, method: {method}}}")
    assert_same_function(logits(model), logits(tmp_path / "out"))


def test_pca_finds_the_space_that_the_stream_is_in(tiny: Path, tmp_path: Path) -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2))).Q[:, :40]
    model = saved(tiny, tmp_path / "model", basis @ basis.T)
    found, facts = cut(model, Hidden(keep=0.625, multiple=8, refit=False), tmp_path / "scratch")
    with found.streamed():
        assert_same_function(logits(model), found.logits(TOKENS))
    assert facts["kept"] == "40 of 64 coordinates, with 100.0% of the energy behind norms"


def test_activity_finds_the_coordinates_that_are_used_and_leaves_the_head_tied(tiny: Path, tmp_path: Path) -> None:
    used = torch.zeros(64)
    used[torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40]] = 1
    model = saved(tiny, tmp_path / "model", used.diag())
    found, _ = cut(model, Hidden(keep=0.625, multiple=8, method="activity"), tmp_path / "scratch")
    with found.streamed():
        assert_same_function(logits(model), found.logits(TOKENS))
    assert "lm_head.weight" not in found.weights


def test_what_stays_tells_what_goes_and_how_much_of_the_length_it_holds() -> None:
    """Two coordinates are there twice, and the norm lets nothing of the last kept one through."""
    x = torch.randn(500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 6:] = x[:, :2]
    x[:, 5] = 0
    weight = torch.tensor([1.0, -2, 3, 1, 0.5, 0, 2, 0.1], dtype=torch.float64)
    y = x * weight
    B, share = explained(y.T @ y / len(y), weight, torch.arange(6))
    assert (y[:, 6:] - y[:, :6] @ B.double().T).norm() < 0.05 * y[:, 6:].norm()
    assert float(share) == pytest.approx(float(x[:, :6].square().sum() / x.square().sum()))


def test_the_folder_is_as_planned_and_loads_anywhere(tiny: Path, text: Path, tmp_path: Path) -> None:
    stage = recipe("hidden: {keep: 0.75, multiple: 16}")
    plan = prepare(stage, model=str(tiny), calibration=str(text), overrides=SMALL)
    report = compress.run(stage, model=str(tiny), output=tmp_path / "out", calibration=str(text), overrides=SMALL)
    assert plan.bytes_after == report["bytes_after"]
    assert plan.parameters_after == report["parameters_after"] < report["parameters_before"]
    assert report["verification"]["max_relative_difference"] == 0
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert (found["hidden_size"], found["head_dim"], found["num_attention_heads"]) == (48, 16, 4)
    ours, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, logits(tmp_path / "out"))


def test_in_a_trained_model_a_turned_stream_is_cut_at_less_loss_and_readers_make_up_for_some(
    assets: Path, tmp_path: Path
) -> None:
    model = assets / "models/stories260k"
    lines = (assets / "data/calibration.jsonl").read_text().splitlines()[:24]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = AutoTokenizer.from_pretrained(model)(texts, return_tensors="pt", truncation=True, max_length=64).input_ids
    calibration, held_out = tokens[:12], tokens[12:]
    expected = AutoModelForCausalLM.from_pretrained(model)(held_out).logits.log_softmax(-1).detach()

    def divergence(**options: Any) -> float:
        found, _ = cut(model, Hidden(keep=0.875, multiple=8, **options), tmp_path / "scratch", calibration)
        with found.streamed():
            logits = found.logits(held_out)
        return float((expected.exp() * (expected - logits.log_softmax(-1))).sum(dim=-1).mean())

    pca, plain = divergence(), divergence(refit=False)
    assert pca < 0.95 * plain
    assert plain < 0.8 * divergence(method="activity")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("keep: 0.0", "keep=0.0 must be a share of the coordinates, above 0 and at most 1"),
        ("keep: 1.5", "keep=1.5 must be a share of the coordinates"),
        ("method: taylor", "method"),
        ("multiple: 0", "multiple=0 must be at least 1"),
        ("keep: 0.9", "keep=0.9 of 64 is 57.6, and the nearest width below 64 that is a multiple of 64 is none"),
        (
            "multiple: 9",
            "and the nearest width below 64 that is a multiple of 9 and of the number of heads is 36. Lower multiple",
        ),
        ("keep: 0.05, multiple: 8", "keep=0.05 of 64 is 3.2"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Path, options: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(f"hidden: {{{options}}}"), model=str(tiny))
    assert told in str(caught.value)
