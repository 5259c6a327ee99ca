"""Targets: what an engine or a GPU cannot run is said by the plan, with its place and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.models.headers import read_folder
from compress.plan import Plan, make_plan
from compress.recipe import parse


def planned(model: Path, stage: str, target: str, rest: str = "") -> Plan:
    return make_plan(parse(f"stages: [{stage}]\ntarget: {target}\n{rest}", "x.yaml"), read_folder(model))


def refused(model: Path, stage: str, target: str, rest: str = "") -> str:
    with pytest.raises(RecipeError) as caught:
        planned(model, stage, target, rest)
    (problem,) = caught.value.problems
    assert problem.startswith("x.yaml:2:")
    return problem


def test_without_a_target_nothing_is_asked(tiny: Path) -> None:
    assert planned(tiny, "{rtn: {scheme: w4a4, group_size: 32}}", "{}").quantized


@pytest.mark.parametrize(
    ("stage", "target", "said"),
    [
        ("{rtn: {scheme: w3a16, group_size: 32}}", "{engine: sglang}", "symmetric weights of 4, 8 bits, not of 3"),
        ("{rtn: {scheme: w3a16, group_size: 32, symmetric: false}}", "{engine: vllm}", "weights of 4, 8 bits"),
        ("{rtn: {scheme: w4a16, group_size: 32, symmetric: false}}", "{engine: sglang}", "Set symmetric: true"),
        ("{rtn: {scheme: w4a4, group_size: 32}}", "{engine: vllm}", "no kernel for inputs of 4 bits"),
        ("{rtn: {scheme: fp8}}", "{gpu: turing}", "runs no fp8, which takes ampere (8.0)"),
        ("{rtn: {scheme: nvfp4}}", "{gpu: turing}", "which takes ampere"),
        ("{rtn: {scheme: w4a8-fp8, group_size: 32}}", "{gpu: ada}", "which takes hopper (9.0)"),
        ("{rtn: {scheme: w4a16, group_size: 64}}", "{tensor_parallel: 2}", "Use group_size: 32"),
        ("{rtn: {scheme: w4a16, group_size: 32}}", "{tensor_parallel: 3}", "4 heads are not divisible"),
    ],
)
def test_what_cannot_run_is_an_error(tiny: Path, stage: str, target: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(tiny, stage, target)
    assert any(said in problem and problem.startswith("x.yaml:2:") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        ("{rtn: {scheme: w4a16, group_size: 32}}", "{engine: sglang, gpu: turing, tensor_parallel: 2}"),
        ("{rtn: {scheme: w3a16, group_size: 32}}", "{engine: vllm, gpu: ampere}"),
        ("{rtn: {scheme: w4a16, group_size: null}}", "{engine: vllm, tensor_parallel: 4}"),
        ("{rtn: {scheme: fp8}}", "{engine: vllm, gpu: hopper, tensor_parallel: 2}"),
        ("{rtn: {scheme: w8a8}}", "{engine: vllm, gpu: turing}"),
    ],
)
def test_what_runs_is_not_spoken_against(tiny: Path, stage: str, target: str) -> None:
    plan = planned(tiny, stage, target)
    assert plan.quantized
    assert not any("compute" in note for note in plan.notes)


def test_a_scale_shared_across_the_cut_is_found_in_layers_whose_inputs_are_divided(tiny: Path) -> None:
    problem = refused(tiny, "{rtn: {scheme: w4a16, group_size: 64}}", "{tensor_parallel: 2}")
    assert "self_attn.o_proj: tensor_parallel=2 leaves 32 inputs to a GPU" in problem


def test_a_format_the_engine_does_not_read_is_refused(tiny: Path) -> None:
    problem = refused(tiny, "{rtn: {scheme: nf4}}", "{engine: sglang}", "checkpoint: {format: bitsandbytes}")
    assert "sglang reads no bitsandbytes. Use format compressed-tensors, gptq, awq, dense" in problem


def test_a_cache_that_no_engine_keeps_is_refused(tiny: Path) -> None:
    assert "keeps no cache in kv8" in refused(tiny, "{kv_cache: {scheme: kv8}}", "{engine: vllm}")


def test_a_gpu_that_runs_weights_alone_is_noted(tiny: Path) -> None:
    for stage, gpu in (("{rtn: {scheme: fp8}}", "ampere"), ("{rtn: {scheme: nvfp4}}", "hopper")):
        notes = planned(tiny, stage, f"{{engine: vllm, gpu: {gpu}}}").notes
        assert any(f"{gpu} does not compute in" in note for note in notes)


def test_an_unknown_engine_is_an_error_with_its_place(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"x\.yaml:2:\d+: target\.engine"):
        planned(tiny, "{rtn: {scheme: w4a16, group_size: 32}}", "{engine: vlm}")
