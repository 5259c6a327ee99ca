from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.distill.distill import Distill
from compress.distill.objective import Objective
from compress.distill.train import Training
from compress.errors import RecipeError, RequestError
from compress.models.headers import read_folder
from compress.pipeline import prepare
from compress.prune.depth import Depth
from compress.prune.width import Width
from compress.quantize.rtn import RTN
from compress.recipe import Calibration, Evaluation, Recipe

TRAINING = Training(tokens=2048, batch_size=4, learning_rate=2e-3, evaluate_every=4, checkpoint_every=4)
STAGES = (Depth(remove=1), Width(ffn=0.75), Distill(training=TRAINING), RTN("w4a16", 32))
RECIPE = """
calibration: {dataset: TEXT, samples: 4, sequence_length: 32}
stages:
  - depth: {remove: 1}
  - width: {ffn: 0.75}
  - distill: {training: {tokens: 8192, batch_size: 4, evaluate_every: 64, checkpoint_every: 4}}
  - rtn: {scheme: w4a16, group_size: 32}
evaluation: {samples: 2}
"""


def recipe(text: Path, *stages: Any) -> Recipe:
    calibration = Calibration(dataset=str(text), samples=4, sequence_length=32)
    return Recipe("segments", stages or STAGES, calibration=calibration, evaluation=Evaluation(samples=2))


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("segments") / "out"
    return output, compress.run(recipe(text), model=str(tiny), output=output)


def test_pruning_healing_and_quantizing_are_one_run(finished: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    output, report = finished
    config = json.loads((output / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 96)
    assert [stage["name"] for stage in report["stages"]] == ["depth", "width", "distill", "rtn"]
    assert [found["stage"] for found in report["segments"]] == ["depth", "width", "distill"]
    assert report["parameters_before"] > report["segments"][0]["parameters"] > report["segments"][1]["parameters"]
    assert report["segments"][1]["parameters"] == report["segments"][2]["parameters"] == report["parameters_after"]
    assert report["bytes_before"] == read_folder(tiny).bytes
    assert len(report["stages"][3]["layers"]) == 14
    assert not list(output.glob(".netsuke"))


def test_the_plan_knows_the_shape_that_comes_out(finished: tuple[Path, dict[str, Any]], tiny: Path, text: Path) -> None:
    _, report = finished
    plan = prepare(recipe(text), model=str(tiny))
    assert plan.parameters_after == report["parameters_after"]
    assert plan.bytes_after == report["bytes_after"]


def test_a_pruned_and_healed_folder_loads_in_plain_transformers(tiny: Path, text: Path, tmp_path: Path) -> None:
    report = compress.run(
        replace(recipe(text, *STAGES[:3]), checkpoint=replace(recipe(text).checkpoint, format="dense")),
        model=str(tiny),
        output=tmp_path / "out",
    )
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert not notes["mismatched_keys"]
    assert model(torch.arange(20).unsqueeze(0)).logits.isfinite().all()
    curve = report["segments"][2]["curve"]
    assert min(each["held_out"] for each in curve if each["held_out"] is not None) < curve[0]["held_out"]


def test_stages_that_make_another_model_come_first(tiny: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match="depth makes another model; put it before rtn"):
        prepare(recipe(text, RTN("w4a16", 32), Depth(remove=1)), model=str(tiny))


TOP_K = replace(TRAINING, teacher_top_k=4)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Distill(dataset="nowhere.jsonl", training=TRAINING), "nowhere.jsonl: there is no such file"),
        (Distill(training=replace(TRAINING, tokens=100)), "tokens=100 are less than one batch of 4 windows of 32"),
        (
            Distill(training=replace(TRAINING, sequence_length=128)),
            "sequence_length=128 is more than the model's context",
        ),
        (
            Distill(training=replace(TRAINING, teacher_top_k=1000)),
            "teacher_top_k=1000 is more than the vocabulary's 258",
        ),
        (Distill(training=replace(TRAINING, optimizer="adamw8bit")), "adamw8bit' needs a GPU|needs bitsandbytes"),
        (
            Distill(objective=Objective(hidden=1.0), training=replace(TRAINING, teacher_top_k=4)),
            "set hidden and relations",
        ),
        (
            Distill(objective=Objective(relations=1.0, relation_heads=5), training=TRAINING),
            "relation_heads=5 must divide",
        ),
    ],
)
def test_what_cannot_be_trained_is_known_before_anything_is_written(
    stage: Distill, message: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        compress.run(recipe(text, Depth(remove=1), stage), model=str(tiny), output=tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def command(text: Path, folder: Path, tiny: Path, *more: str) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("TEXT", str(text)))
    program = "import sys; from compress.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "run", str(file), "--model", str(tiny), *more]


def test_a_run_killed_while_it_trains_goes_on_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(
        command(text, tmp_path, tiny, "--output", str(undisturbed)), check=True, env=environment, capture_output=True
    )
    process = subprocess.Popen(
        command(text, tmp_path, tiny, "--output", str(killed)), env=environment, stderr=subprocess.DEVNULL
    )
    work = tmp_path / "killed.partial" / ".netsuke" / "segments" / "2-distill.partial" / ".netsuke" / "training"
    while process.poll() is None and not list(work.glob("*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    subprocess.run(
        command(text, tmp_path, tiny, "--output", str(killed), "--resume"),
        check=True,
        env=environment,
        capture_output=True,
    )
    for file in sorted(undisturbed.glob("*.safetensors")):
        assert file.read_bytes() == (killed / file.name).read_bytes()
