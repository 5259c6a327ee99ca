"""The stage `sparsify`: exactly as many zeros as asked for, in the right places, and a folder that loads anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.weights import open_weights
from compress.errors import RecipeError
from compress.pipeline import prepare
from compress.recipe import parse

SMALL = [
    "calibration.samples=8",
    "calibration.sequence_length=48",
    "evaluation.samples=4",
    "evaluation.sequence_length=64",
]


def recipe(*stages: str) -> Any:
    return parse("stages:\n" + "".join(f"  - {stage}\n" for stage in stages), "x.yaml")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def run(model: Path, text: Path, output: Path, *stages: str) -> dict[str, Any]:
    return compress.run(recipe(*stages), model=str(model), output=output, calibration=str(text), overrides=SMALL)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_two_of_four_are_zero_everywhere_and_nothing_else_changed(
    method: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    report = run(tiny, text, tmp_path / "out", f'sparsify: {{pattern: "2:4", method: {method}}}')
    before, after = weights(tiny), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith("_proj.weight"):
            assert ((tensor.view(-1, 4) != 0).sum(dim=1) <= 2).all(), name
            assert (tensor != 0).float().mean() > 0.49, name
        else:
            assert torch.equal(tensor, before[name]), name
    (stage,) = report["stages"]
    assert {layer["scheme"] for layer in stage["layers"]} == {"2:4"}
    assert all(0 < layer["error"] < 0.7 for layer in stage["layers"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, tokenizer = compress.load(tmp_path / "out", dtype=torch.float32)
    ids = tokenizer("the carver keeps", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, ours(ids).logits)


def test_what_stays_makes_up_for_what_goes(tiny: Path, text: Path, tmp_path: Path) -> None:
    """By the mean error of layers: masks by SparseGPT refitted are better than its own, and these than Wanda's."""

    def error(name: str, options: str) -> float:
        report = run(tiny, text, tmp_path / name, f"sparsify: {{sparsity: 0.5, {options}}}")
        layers = report["stages"][0]["layers"]
        return sum(layer["error"] for layer in layers) / len(layers)

    refitted = error("a", "method: sparsegpt")
    sparsegpt = error("b", "method: sparsegpt, refit: false")
    wanda = error("c", "method: wanda, refit: false")
    assert refitted < sparsegpt < wanda


def test_rounded_to_nearest_zeros_stay(tiny: Path, text: Path, tmp_path: Path) -> None:
    run(
        tiny,
        text,
        tmp_path / "out",
        'sparsify: {pattern: "2:4", method: wanda}',
        "rtn: {scheme: w4a16, group_size: 32}",
    )
    model, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    assert ((layer.dequantize(torch.float32).view(-1, 4) != 0).sum(dim=1) <= 2).all()


def test_gptq_behind_it_keeps_every_zero_and_costs_little(assets: Path, tmp_path: Path) -> None:
    """On a trained model, whose predictions rounding to 4 bits changes less than the zeros do."""
    options = ["calibration.samples=16", "calibration.sequence_length=128", "evaluation.samples=8"]
    options += ["evaluation.sequence_length=128"]

    def divergence(name: str, *stages: str) -> float:
        given = {"model": str(assets / "models" / "stories260k"), "output": tmp_path / name}
        text = str(assets / "data" / "calibration.jsonl")
        report = compress.run(recipe(*stages), **given, calibration=text, overrides=options)
        return report["evaluation"]["texts"][0]["kl_divergence"]

    prune = 'sparsify: {pattern: "2:4"}'
    alone = divergence("sparse", prune)
    both = divergence("both", prune, "gptq: {scheme: w4a16, group_size: null}")
    assert both < 1.05 * alone
    rounded, sparse = open_weights(tmp_path / "both"), weights(tmp_path / "sparse")
    for name in (name for name in sparse if name.endswith("_proj.weight")):
        weight = rounded.read(name)
        assert ((weight.view(-1, 4) != 0).sum(dim=1) <= 2).all(), name
        if ".layers.0." in name:  # further on, masks know of the rounding before them
            assert not weight[sparse[name] == 0].any(), name


def test_blocks_with_outliers_keep_more(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][::4, ::4] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    report = run(model, text, tmp_path / "out", "sparsify: {sparsity: 0.6, method: wanda, owl: true}")
    after = weights(tmp_path / "out")
    shares = []
    for block in range(3):
        layers = [tensor for name, tensor in after.items() if f"layers.{block}." in name and "_proj" in name]
        zeros = [float((tensor == 0).float().mean()) for tensor in layers]
        assert max(zeros) - min(zeros) < 1 / 64  # rows are of 64 and more
        shares.append(sum(zeros) / len(zeros))
    assert shares[1] == pytest.approx(0.52, abs=5e-3)
    assert min(shares[0], shares[2]) > 0.6
    assert sum(shares) / 3 == pytest.approx(0.6, abs=5e-3)
    assert len({layer["scheme"] for layer in report["stages"][0]["layers"]}) == 3


def test_selected_layers_only(tiny: Path, text: Path, tmp_path: Path) -> None:
    run(tiny, text, tmp_path / "out", "sparsify: {sparsity: 0.3, method: magnitude, refit: false, layers: [mlp]}")
    shares = {name: float((tensor == 0).float().mean()) for name, tensor in weights(tmp_path / "out").items()}
    assert all(share == pytest.approx(0.3, abs=1e-3) for name, share in shares.items() if ".mlp." in name)
    assert all(share < 0.01 for name, share in shares.items() if ".self_attn." in name)


def test_the_plan_says_what_is_pruned(tiny: Path) -> None:
    layers = prepare(recipe('sparsify: {pattern: "2:4", ignore: [lm_head, attn]}'), model=str(tiny)).to_json()["layers"]
    actions = {layer["name"]: (layer["action"], layer["sparsity"]) for layer in layers}
    assert actions["model.layers.0.mlp.up_proj"] == ("prune", "2:4")
    assert actions["model.layers.0.self_attn.q_proj"] == ("keep", None)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (("sparsify: {}",), 'give a sparsity, as 0.5, or a pattern, as "2:4"'),
        (("sparsify: {sparsity: 1.0}",), "must be a share of zeros, above 0 and below 1"),
        (('sparsify: {pattern: "2:4", method: obs}',), "method"),
        (('sparsify: {pattern: "2:4", owl: true}',), "2:4 is the same everywhere. Give a sparsity"),
        (("sparsify: {sparsity: 0.95, owl: true}",), "must be 0.08 or more away from 0 and 1 for owl"),
        (('sparsify: {pattern: "3:7"}',), "in_features=64 is not a multiple of m=7 of the pattern 3:7"),
        (("sparsify: {sparsity: 0.5, layers: [lm_head]}",), "embeddings and heads keep their weights"),
        (("sparsify: {sparsity: 0.5}", "sparsify: {sparsity: 0.5}"), "is pruned by stages[0] already"),
        (
            ("sparsify: {sparsity: 0.5}", "hqq: {scheme: w4a16}"),
            "hqq would move weights that are zero. Use rtn or gptq",
        ),
        (("sparsify: {sparsity: 0.5}", "autoround: {scheme: w4a16}"), "autoround would move weights that are zero"),
        (("rtn: {scheme: w8a16}", "sparsify: {sparsity: 0.5}"), "sparsify must come before every quantizer"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Path, stages: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(*stages), model=str(tiny))
    assert told in str(caught.value)
