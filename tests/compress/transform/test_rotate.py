"""Rotation as a stage: what it promises to the plan, and that folders made with it run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.checkpoint.weights import open_model
from compress.errors import RecipeError
from compress.pipeline import prepare
from compress.recipe import parse
from compress.transform.rotate import Rotate


def recipe(*stages: str, checkpoint: str = "compressed-tensors") -> str:
    lines = "".join(f"\n  - {stage}" for stage in stages)
    return f"stages:{lines}\ncheckpoint: {{format: {checkpoint}}}\n"


def refusal(model: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepare(parse(text, "x.yaml"), model=str(model))
    return str(caught.value)


def test_rotating_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be rotated"):
        Rotate(r1=False, r2=False, r4=False)


def test_it_must_stand_first(tiny: Path) -> None:
    told = refusal(tiny, recipe("awq: {}", "rotate: {}", "rtn: {scheme: w4a16, group_size: null}"))
    assert "x.yaml:3:5: rotate must be the first stage" in told


def test_an_ordinary_folder_cannot_ask_for_rotated_inputs(tiny: Path) -> None:
    told = refusal(tiny, recipe("rotate: {r4: true}", "rtn: {scheme: w4a16, group_size: null}", checkpoint="dense"))
    assert "x.yaml:2:5: an ordinary folder cannot say that inputs are rotated" in told


def test_learning_needs_rounded_inputs_and_r1(tiny: Path) -> None:
    told = refusal(tiny, recipe("rotate: {steps: 5}", "rtn: {scheme: w4a16, group_size: null}"))
    assert "x.yaml:2:5: rotate looks at rounded inputs, and no later scheme rounds any" in told
    with pytest.raises(ValueError, match="it is R1 that would be learned"):
        Rotate(r1=False, steps=5)


def test_a_learned_rotation_keeps_the_function_and_is_learned_once(tiny: Path, text: Path, tmp_path: Path) -> None:
    """In eight bits little is lost, whatever the rotation; resumed, the run has the one it began with."""
    stages = "rotate: {steps: 5}", "rtn: {scheme: w8a8, group_size: null}"
    settings = ["calibration.samples=4", "calibration.sequence_length=32", "evaluation.samples=2"]

    def learned(output: str, **options: Any) -> dict[str, Any]:
        given = parse(recipe(*stages), "x.yaml")
        return compress.run(
            given, model=str(tiny), output=tmp_path / output, calibration=str(text), overrides=settings, **options
        )

    def interrupt(phase: str, share: float, words: str) -> None:
        if words == "block 2 of 3":
            raise KeyboardInterrupt

    report = learned("whole")
    assert 0 < report["rotation"]["error_after"] < report["rotation"]["error_before"]
    assert report["evaluation"]["texts"][0]["kl_divergence"] < 1e-2
    with pytest.raises(KeyboardInterrupt):
        learned("out", progress=interrupt)
    learned("out", resume=True)
    shards = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def run(model: Path, output: Path, *stages: str, checkpoint: str = "compressed-tensors") -> Path:
    compress.run(parse(recipe(*stages, checkpoint=checkpoint), "x.yaml"), model=str(model), output=output)
    return output


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = open_model(folder)
    with model.streamed():
        return model.logits(tokens)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def test_a_rotated_folder_in_eight_bits_computes_what_the_model_did(
    tiny: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    folder = run(tiny, tmp_path / "out", "rotate: {r4: true}", "rtn: {scheme: w8a16, group_size: null}")
    expected = logits(tiny, tokens)
    assert (logits(folder, tokens) - expected).norm() < 0.05 * expected.norm()  # bfloat16 twice, random weights


def test_a_loaded_folder_rotates_inputs_as_the_streamed_one_does(
    tiny: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    folder = run(tiny, tmp_path / "out", "rotate: {r4: true}", "rtn: {scheme: w4a4, group_size: null}")
    model, _ = compress.load(folder, dtype=torch.float32)
    torch.testing.assert_close(model(tokens).logits, logits(folder, tokens), rtol=1e-4, atol=1e-4)


def test_what_is_rotated_for_good_loads_in_plain_transformers(tiny: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    folder = run(tiny, tmp_path / "out", "rotate: {}", "rtn: {scheme: w8a16, group_size: null}", checkpoint="dense")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits(tiny, tokens)
    assert (model(tokens).logits - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(model(tokens).logits, logits(folder, tokens), rtol=1e-4, atol=1e-4)


def test_statistics_are_of_rotated_inputs(tiny: Path, tmp_path: Path) -> None:
    """With the second stream: a mix-up of coordinates would be worse than rounding to nearest."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    errors = {}
    for stage in ("rtn: {scheme: w4a4, group_size: null}", "gptq: {scheme: w4a4, group_size: null, asymmetric: true}"):
        settings = "calibration: {samples: 8, sequence_length: 64}\n" + recipe("rotate: {r4: true}", stage)
        report = compress.run(
            parse(settings, "x.yaml"), model=str(tiny), output=tmp_path / stage[:3], calibration=str(text)
        )
        errors[stage[:3]] = report["evaluation"]["texts"][0]["kl_divergence"]
    assert errors["gpt"] < errors["rtn"]
