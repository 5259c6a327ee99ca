"""The stage `merge_heads`: heads that are one in disguise merge without loss, others at less than their mean costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import compress
from compress.core.heads import Attention, regrouped, scaled_keys, turned_values
from compress.errors import RecipeError
from compress.models import anatomy_for
from compress.models.headers import TensorHeader, read_folder
from compress.pipeline import prepare
from compress.prune.merge_heads import obstacle
from compress.recipe import parse

SMALL = ["calibration.samples=8", "calibration.sequence_length=48", "evaluation.samples=4"]


def recipe(options: str) -> Any:
    return parse(f"stages: [merge_heads: {{{options}}}]\ncheckpoint: {{format: dense}}", "x.yaml")


def merged(model: Path, text: Path, output: Path, options: str, *more: str) -> dict[str, Any]:
    return compress.run(
        recipe(options), model=str(model), output=output, calibration=str(text), overrides=[*SMALL, *more]
    )


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 60).unsqueeze(0)).logits


@pytest.fixture(scope="module")
def disguised(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2, whose keys and values have biases, with four such heads: two, twice each, turned, scaled and mixed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("disguised") / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((tiny / "config.json").read_text()) | {"num_key_value_heads": 4, "dtype": "float32"}
    kept = {name: value for name, value in config.items() if name not in {"architectures", "model_type"}}
    model = Qwen2ForCausalLM(Qwen2Config(**kept))
    twice = torch.tensor([0, 0, 1, 1])
    for block in model.model.layers:
        attention = block.self_attn
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        joined = []
        for layer in layers:
            layer.bias.data.normal_()
            rows = torch.cat([layer.weight.data, layer.bias.data.unsqueeze(1)], dim=1)
            joined.append(rows if layer is layers[0] else rows.unflatten(0, (4, -1))[twice].flatten(0, 1))
        a = Attention(*joined, attention.o_proj.weight.data, head_dim=16)
        a = turned_values(a, torch.linalg.qr(torch.randn(4, 16, 16).double()).Q)
        a = scaled_keys(a, torch.polar(torch.randn(4, 8).double().mul(0.3).exp(), torch.randn(4, 8).double()))
        a = regrouped(a, torch.tensor([[0, 2], [3, 1]]))
        for layer, weight in zip(layers, (a.query, a.key, a.value), strict=True):
            layer.weight.data, layer.bias.data = weight[:, :-1].contiguous(), weight[:, -1].contiguous()
        attention.o_proj.weight.data = a.output
    model.save_pretrained(folder)
    return folder


def test_heads_that_are_one_in_disguise_are_merged_and_the_model_computes_the_same(
    disguised: Path, text: Path, tmp_path: Path
) -> None:
    report = merged(disguised, text, tmp_path / "out", "kv_heads: 2")
    assert_close(logits(tmp_path / "out"), logits(disguised), rtol=0, atol=2e-4)
    errors = {layer["name"].rpartition(".")[2]: layer["error"] for layer in report["stages"][0]["layers"]}
    assert errors.keys() == {"k_proj", "v_proj", "o_proj"}
    assert max(errors.values()) < 1e-5
    merged(disguised, text, tmp_path / "mean", "kv_heads: 2, align: false, refit: false")
    assert (logits(tmp_path / "mean") - logits(disguised)).norm() > 0.1 * logits(disguised).norm()


@pytest.mark.parametrize("options", ["kv_heads: 0.5", "kv_heads: 1, align: false, refit: false"])
def test_the_folder_that_was_planned_is_an_ordinary_one_with_fewer_heads(
    options: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    plan = prepare(recipe(options), model=str(tiny))
    report = merged(tiny, text, tmp_path / "out", options)
    assert report["bytes_after"] == plan.bytes_after < plan.bytes_before
    assert report["verification"]["max_relative_difference"] < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 1
    before, after = load_file(tiny / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in before if not after[name].equal(before[name])}
    assert changed <= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert after["model.layers.2.self_attn.k_proj.weight"].shape == (16, 64)
    ours, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(torch.arange(3, 60).unsqueeze(0)).logits, logits(tmp_path / "out"))


def test_in_a_trained_model_alignment_lowers_what_merging_costs_and_refitting_lowers_it_further(
    assets: Path, tmp_path: Path
) -> None:
    def divergence(name: str, options: str) -> float:
        report = merged(
            assets / "models/stories260k",
            assets / "data/calibration.jsonl",
            tmp_path / name,
            f"kv_heads: 2, {options}",
            "calibration.samples=16",
            "calibration.sequence_length=128",
            "evaluation.sequence_length=128",
            f"evaluation.text=[{assets / 'data/test.jsonl'}]",
        )
        return report["evaluation"]["texts"][0]["kl_divergence"]

    mean = divergence("mean", "align: false, refit: false")
    aligned = divergence("aligned", "refit: false")
    assert aligned < 0.5 * mean
    assert divergence("refitted", "refit: true") < 0.9 * aligned


# ---- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("kv_heads: 0", "kv_heads=0 must be a number of heads, as 2, or a share below 1, as 0.5"),
        ("kv_heads: 1.0", "kv_heads=1.0 must be a number of heads"),
        ("kv_heads: 2", "kv_heads=2: 2 heads cannot be merged into that many groups of one size. Use 1"),
        ("kv_heads: 3", "kv_heads=3: 2 heads cannot be merged into that many"),
    ],
)
def test_numbers_of_heads_that_cannot_be_are_refused(options: str, told: str, tiny: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(options), model=str(tiny))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tensor", "told"),
    [
        ({}, "", None),
        ({"model_type": "qwen3"}, "model.layers.0.self_attn.k_norm.weight", "keys pass a norm, model.layers.0.self"),
        ({"partial_rotary_factor": 0.5}, "", "only a part of each head is rotated, partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "", "partial_rotary_factor=0.25"),
        ({"model_type": "cohere"}, "", "it is not known to rotate channels j and j + d/2 of a head together. Known"),
    ],
)
def test_keys_that_alignment_would_change_are_refused(
    config: dict[str, Any], tensor: str, told: str | None, tiny: Path
) -> None:
    folder = read_folder(tiny)
    more = {tensor: TensorHeader(tensor, "BF16", (16,), folder.files[0], 0)} if tensor else {}
    folder = replace(folder, config=folder.config | config, tensors={**folder.tensors, **more})
    found = obstacle(folder, anatomy_for(folder.config, folder.shapes))
    assert found is None if told is None else told in (found or "")


def test_layers_that_are_no_queries_keys_and_values_are_refused(tiny: Path) -> None:
    shapes = {name: shape for name, shape in read_folder(tiny).shapes.items() if "q_proj" not in name}
    found = obstacle(read_folder(tiny), anatomy_for({"model_type": "other"}, shapes))
    assert found == "queries, keys and values are not layers of their own"
