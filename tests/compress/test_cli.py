from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.cli import main

RECIPE = """
calibration: {samples: 4, sequence_length: 32}
stages:
- gptq: {scheme: w4a16, group_size: 32, ignore: [lm_head]}
evaluation: {samples: 2}
"""
MIXED = """
stages:
- rtn: {scheme: w8a16, group_size: 32, layers: [attn.q]}
- rtn: {scheme: w4a16, group_size: 32, ignore: [attn.q]}
"""

Spoil = Callable[[Path, Path, Path], None]
"""Takes the folders of the model and of the output, and the text."""


def nothing(model: Path, output: Path, text: Path) -> None:
    pass


def without_tokenizer(model: Path, output: Path, text: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def without_model(model: Path, output: Path, text: Path) -> None:
    shutil.rmtree(model)


def without_text(model: Path, output: Path, text: Path) -> None:
    text.write_text("\n")


def truncated(model: Path, output: Path, text: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def occupied(model: Path, output: Path, text: Path) -> None:
    output.mkdir()
    (output / "mine").write_text("precious")


@pytest.mark.parametrize(
    ("recipe", "spoil", "complaint"),
    [
        (
            RECIPE.replace("ignore", "ingore"),
            nothing,
            ":4:41: stages[0].gptq has no field 'ingore'. Did you mean 'ignore'?",
        ),
        (RECIPE.replace("lm_head", "lm_haed"), nothing, "'lm_haed' matches no layer. Did you mean 'lm_head'?"),
        (RECIPE.replace("gptq", "gptx"), nothing, "Did you mean 'gptq'?"),
        (
            RECIPE.replace("group_size: 32", "group_size: 96"),
            nothing,
            "is not a multiple of group_size=96. Use 64 or 32",
        ),
        (RECIPE.replace("group_size: 32", "group_size: -8"), nothing, "group_size=-8 must be at least 1"),
        (MIXED, nothing, "serving engines run these as one matrix"),
        (RECIPE, without_tokenizer, "has no tokenizer"),
        (RECIPE, without_model, "no such model folder"),
        (RECIPE, without_text, "there is no text in it"),
        (RECIPE, truncated, "is cut off"),
        (RECIPE, occupied, "exists already"),
    ],
)
def test_a_wrong_request_is_one_error_and_changes_nothing(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    spoil: Spoil,
    complaint: str,
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copy(text, tmp_path / "text.jsonl")
    (tmp_path / "recipe.yaml").write_text(recipe)
    model, output, words = tmp_path / "model", tmp_path / "out", tmp_path / "text.jsonl"
    spoil(model, output, words)
    before = sorted(tmp_path.rglob("*"))
    command = ["run", str(tmp_path / "recipe.yaml"), "--model", str(model), "--output", str(output)]
    assert main([*command, "--calibration", str(words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("error: ") == 1
    assert complaint in told.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_prints_one_json_object_that_equals_report_json(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = ["run", str(tmp_path / "recipe.yaml"), "--model", str(tiny), "--output", str(tmp_path / "out")]
    assert main([*command, "--calibration", str(text), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == printed["bytes_after"]
    assert found["bits_per_weight"] == pytest.approx(printed["bits_per_weight"])
    assert [layer["shape"] for layer in found["layers"] if layer["name"].endswith("0.mlp.down_proj")] == [[64, 128]]


def test_a_missed_gate_is_exit_code_3_with_a_whole_folder(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + "gates: {max_kl_divergence: 0.0000001}\n")
    command = ["run", str(tmp_path / "recipe.yaml"), "--model", str(tiny), "--output", str(tmp_path / "out")]
    assert main([*command, "--calibration", str(text)]) == 3
    assert "gate max_kl_divergence not met" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_a_dry_run_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "w4a16-rtn", "--model", str(tiny), "--output", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main([*command, "--set", "rtn.group_size=32"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == ["rtn"]
    assert not list(tmp_path.iterdir())


def test_a_model_is_scored_against_itself_without_loss(
    tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny), "--baseline", str(tiny), "--text", str(text), "--limit", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["texts"][0]
    assert (scores["kl_divergence"], scores["top1_agreement"], scores["perplexity_ratio"]) == (0, 1, 1)
    assert set(scores) >= {"name", "perplexity", "tokens", "context"}


def test_models_are_compared_in_one_table_and_on_one_page(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "w4a16-rtn", "--model", str(tiny), "--output", str(tmp_path / "small"), "--set"]
    assert main([*command, "rtn.group_size=32", "--set", "gates.max_perplexity_ratio=null"]) == 0
    capsys.readouterr()
    command = ["compare", str(tmp_path / "small"), str(tiny), "--baseline", str(tiny), "--text", str(text)]
    assert main([*command, "--limit", "2", "--no-cache", "--report", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert told.count("●") == 3  # both models, and what the sign means
    assert "<h2>KL divergence on text.jsonl</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_shipped_recipe_is_printed_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "w4a16-gptq"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# ")
    assert "- gptq:" in printed


def test_text_is_generated_on_the_packed_runtime(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "w4a16-rtn", "--model", str(tiny), "--output", str(tmp_path / "out")]
    assert main([*command, "--set", "rtn.group_size=32", "--set", "gates.max_perplexity_ratio=null"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "every", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("every")


def test_nothing_to_score_is_a_wrong_request(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny)]) == 2
    assert "give --text FILE, --tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cuda:99"], "cannot be used here"),
        (["--set", "evaluation.text=[nosuch.txt]"], "nosuch.txt"),
        (["--calibration", "typo.jsonl"], "typo.jsonl"),
    ],
)
def test_what_is_missing_is_said_before_the_work(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    command = ["run", "w4a16-rtn", "--model", str(tiny), "--output", str(tmp_path / "out")]
    assert main([*command, "--set", "rtn.group_size=32", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_never_the_output(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    command = ["run", "w4a16-rtn", "--model", str(model), "--output", str(model), "--overwrite"]
    assert main([*command, "--set", "rtn.group_size=32"]) == 2
    assert "is the model's own folder" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_gate_that_cannot_be_measured_is_said_not_to_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "w4a16-rtn", "--model", str(tiny), "--output", str(tmp_path / "out")]
    assert main([*command, "--set", "rtn.group_size=32"]) == 0
    told = capsys.readouterr().out
    assert "not measured, limit 1.05" in told
    assert "no text to score on" in told


def test_a_wrong_window_is_refused(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny), "--text", str(text), "--context", "1"]) == 2
    assert "--context 1: must be at least 2" in capsys.readouterr().err
