"""A recipe that begins with `shape`: what is found takes its place, once, and what was measured is what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.calibrate.data import calibration_windows, read_dataset
from compress.models.store import load_tokenizer
from compress.pipeline import prepare
from compress.pipeline.search import await_shape
from compress.prune.depth import Depth
from compress.prune.shape import Shape
from compress.prune.width import Width
from compress.quantize.rtn import RTN
from compress.recipe import Calibration, CheckpointOptions, Evaluation, Recipe, load

SHAPE = Shape(parameters=0.8, heads=(1.0, 0.5), samples=4)


def recipe(text: Path, *stages: Any, form: str = "compressed-tensors") -> Recipe:
    calibration = Calibration(dataset=str(text), samples=6, sequence_length=32)
    return Recipe("shaped", stages, calibration, Evaluation(samples=2), CheckpointOptions(form))


class Watched:
    """Progress that is noted, and a run that is interrupted when a phase begins."""

    def __init__(self, until: str = "") -> None:
        self.until = until
        self.phases: list[str] = []

    def __call__(self, phase: str, share: float, words: str) -> None:
        self.phases.append(phase)
        if phase == self.until:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was interrupted when the shape was found, and went on."""
    output = tmp_path_factory.mktemp("search") / "out"
    asked, before, after = recipe(text, SHAPE, RTN("w4a16", 32)), Watched("blocks"), Watched()
    with pytest.raises(KeyboardInterrupt):
        compress.run(asked, model=str(tiny), output=output, progress=before)
    assert "shape" in before.phases
    found = await_shape(prepare(asked, model=str(tiny)), output.with_name("out.partial") / ".netsuke")
    report = compress.run(asked, model=str(tiny), output=output, resume=True, progress=after)
    assert "shape" not in after.phases
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in found.recipe.stages]
    return output, report


def test_the_best_candidate_becomes_the_stages_of_the_recipe(
    finished: tuple[Path, dict[str, Any]], tiny: Path, text: Path
) -> None:
    output, report = finished
    tried = report["shape"]["candidates"]
    taken = tried[report["shape"]["chosen"]]
    assert len(tried) == 3
    assert taken["measured"] == min(each["measured"] for each in tried)
    assert report["parameters_after"] == round(taken["share"] * report["parameters_before"])
    assert report["parameters_after"] <= 0.8 * report["parameters_before"]
    saved = load(output / "recipe.yaml")
    depth = [Depth(remove=taken["removed"], samples=3)] if taken["removed"] else []
    width = [Width(ffn=taken["ffn"], heads=taken["heads"])] if min(taken["ffn"], taken["heads"]) < 1 else []
    assert saved == replace(recipe(text), stages=(*depth, *width, RTN("w4a16", 32)))
    assert prepare(saved, model=str(tiny)).bytes_after == report["bytes_after"]
    page = (output / "report.html").read_text()
    assert "Shapes within 80.0% of the parameters" in page


def test_what_is_measured_is_the_divergence_on_windows_that_were_not_fitted(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    stage = Shape(parameters=0.8, ffn=(1.0,), samples=4)
    asked = recipe(text, stage, form="dense")
    report = compress.run(asked, model=str(tiny), output=tmp_path / "out")
    (taken,) = report["shape"]["candidates"]
    tokenizer = load_tokenizer(tiny)
    documents = read_dataset(str(text), "train", tokenizer)
    tokens = calibration_windows(documents, tokenizer, samples=6, length=32, seed=0).tokens[3:4]
    original, short = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0, :-1].log_softmax(-1)
        for folder in (tiny, tmp_path / "out")
    )
    divergence = (original.exp() * (original - short)).sum(-1).mean().item()
    assert taken["measured"] == taken["predicted"] == pytest.approx(divergence, rel=1e-4)
    assert (report["shape"]["fitted"], report["shape"]["held_out"]) == (3, 1)
