from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import ModelError, RecipeError
from compress.models.headers import read_folder
from compress.plan import Plan, make_plan
from compress.recipe import parse

GPTQ = "stages:\n- gptq: {scheme: w4a16, group_size: 32, ignore: [lm_head]}\n"


def planned(model: Path, recipe: str) -> Plan:
    return make_plan(parse(recipe, "x.yaml"), read_folder(model))


def problems(model: Path, recipe: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        planned(model, recipe)
    return caught.value.problems


def test_every_block_linear_is_quantized_and_the_rest_is_kept_with_a_reason(tiny: Path) -> None:
    layers = planned(tiny, GPTQ).layers
    assert sum(layer.action == "quantize" for layer in layers) == 3 * 7
    kept = {layer.name: layer.reason for layer in layers if layer.action == "keep"}
    assert kept == {"model.embed_tokens": "outside the blocks", "lm_head": "outside the blocks"}


def test_bits_per_weight_counts_codes_scales_and_shapes(tiny: Path) -> None:
    plan = planned(tiny, GPTQ)
    layer = next(layer for layer in plan.layers if layer.role == "mlp.down")
    assert layer.shape == (64, 128)
    assert layer.bytes_after == 64 * 128 // 2 + 64 * 4 * 2 + 16
    assert 4.5 < plan.bits_per_weight < 4.6


def test_the_plan_of_a_calibrated_recipe_is_cut_to_the_context_of_the_model(tiny: Path) -> None:
    plan = planned(tiny, GPTQ + "calibration: {samples: 3, sequence_length: 2048}")
    assert (plan.sequence_length, plan.calibration_tokens) == (64, 192)
    assert "64 tokens, the model's context" in " ".join(plan.notes)


def test_a_group_that_divides_no_row_is_an_error_with_place_and_fix(tiny: Path) -> None:
    found = problems(tiny, GPTQ.replace("group_size: 32", "group_size: 96"))
    assert found[0].startswith("x.yaml:2:")
    assert "in_features=64, 128 is not a multiple of group_size=96. Use 64 or 32, or add" in found[0]


def test_where_groups_are_fixed_no_other_size_is_offered(tiny: Path) -> None:
    (found,) = problems(tiny, "stages: [{rtn: {scheme: fp8-block}}]")
    assert "group_size=128. The groups of fp8-block are fixed: choose another scheme, or add" in found


def test_a_selector_that_matches_nothing_is_an_error_with_a_suggestion(tiny: Path) -> None:
    found = problems(tiny, GPTQ.replace("lm_head", "lm_haed"))
    assert found == ("x.yaml:2:41: stages[0].gptq.ignore: 'lm_haed' matches no layer. Did you mean 'lm_head'?",)


def test_layers_that_serve_as_one_must_be_quantized_alike(tiny: Path) -> None:
    recipe = """
stages:
- gptq: {scheme: w8a16, group_size: 32, layers: [attn.q]}
- rtn: {scheme: w4a16, group_size: 32, ignore: [attn.q]}
"""
    found = problems(tiny, recipe)
    assert len(found) == 1
    assert "self_attn.k_proj w4a16, self_attn.q_proj w8a16" in found[0]
    assert "serving engines run these as one matrix" in found[0]


def test_a_layer_belongs_to_one_quantizer(tiny: Path) -> None:
    found = problems(tiny, "stages:\n- rtn: {scheme: w4a16, group_size: 32}\n- rtn: {scheme: w8a16, group_size: 32}\n")
    assert "is quantized by stages[0] already" in found[0]


def test_a_stage_without_work_is_an_error(tiny: Path) -> None:
    found = problems(tiny, "stages:\n- rtn: {scheme: w4a16, group_size: 32, ignore: [Linear]}\n")
    assert any("would change nothing" in problem for problem in found)


def test_a_transform_needs_a_quantizer_after_it(tiny: Path) -> None:
    found = problems(tiny, "stages:\n- rtn: {scheme: w4a16, group_size: 32}\n- awq: {}\n")
    assert any("put rtn or gptq after it" in problem for problem in found)
    assert any("must come before every quantizer" in problem for problem in found)


def test_smoothing_needs_a_scheme_that_rounds_inputs(tiny: Path) -> None:
    (problem,) = problems(tiny, "stages:\n- smoothquant: {}\n- rtn: {scheme: w4a16, group_size: 32}\n")
    assert "smoothquant looks at rounded inputs, and no later scheme rounds any" in problem


def test_all_problems_are_reported_at_once(tiny: Path) -> None:
    found = problems(tiny, "stages:\n- rtn: {scheme: w4a16, group_size: 96, ignore: [nothing]}\n- awq: {}\n")
    assert len(found) > 3


def test_an_unknown_format_is_an_error_with_a_suggestion(tiny: Path) -> None:
    found = problems(tiny, GPTQ + "checkpoint: {format: compressed-tensor}")
    assert "Did you mean 'compressed-tensors'?" in found[0]


def test_a_quantized_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantized already \\(gptq\\)"):
        planned(tmp_path, GPTQ)


def test_planning_does_not_need_transformers(tiny: Path) -> None:
    code = (
        "import sys; from compress.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'transformers' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "plan", "w4a16-rtn", "--model", str(tiny), "--set", "rtn.group_size=32"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_after"] > 0
