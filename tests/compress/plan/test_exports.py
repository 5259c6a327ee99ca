"""Further formats of one run: refused by the plan, written beside the folder, made again where they were cut short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.gguf import load as load_gguf
from compress.checkpoint.weights import QuantizedWeights
from compress.cli import main
from compress.errors import OutputError, RecipeError, RequestError
from compress.models.headers import read_folder
from compress.pipeline import convert as converting
from compress.pipeline import prepare
from compress.plan import exports
from compress.plan.exports import place
from compress.recipe import dump, parse
from compress.report import summary_lines

STAGE = "rtn: {scheme: w4a16, group_size: 32}"


def recipe(also: str, stage: str = STAGE, form: str = "compressed-tensors") -> Any:
    text = f"stages: [{stage}]\nevaluation: {{samples: 1}}\ncheckpoint:\n  format: {form}\n  also: [{also}]\n"
    return parse(text, "x.yaml")


def test_a_further_format_lies_beside_the_folder_and_is_called_after_it(tmp_path: Path) -> None:
    assert place(tmp_path / "a.b", "gptq_v2") == tmp_path / "a.b.gptq_v2"
    assert place(tmp_path / "a.b", "gguf-q4_0") == tmp_path / "a.b.q4_0.gguf"


@pytest.mark.parametrize(
    ("also", "stage", "form", "said"),
    [
        ("gptqq", STAGE, "compressed-tensors", r"5:10: there is no format 'gptqq' .* Did you mean 'gptq'\? There are"),
        ("awq, gguf-q9", STAGE, "compressed-tensors", "5:15: gguf-q9: there is no such type. There are gguf-q4_0"),
        ("awq, awq", STAGE, "compressed-tensors", "5:15: awq is asked for already"),
        ("gptq", STAGE, "gptq", "5:10: gptq is asked for already"),
        ("bitsandbytes", STAGE, "compressed-tensors", "5:10: model.*q_proj: bitsandbytes holds nf4 and w8a16"),
        ("awq", "rtn: {scheme: w8a16}", "compressed-tensors", "5:10: .*awq holds integer weights of 4 bits"),
        ("gptq", "rtn: {scheme: fp8}", "compressed-tensors", "5:10: .*gptq holds integer weights"),
        ("onnx", "rtn: {scheme: fp8a16}", "compressed-tensors", "5:10: .*MatMulNBits holds integer weights"),
        ("gptq", STAGE, "dense", "5:10: a folder of dense has no codes that gptq could hold"),
        ("sparse-24-bitmask", STAGE, "compressed-tensors", "5:10: there is no format 'sparse-24-bitmask' to convert"),
        (
            "gptq",
            "rtn: {scheme: w4a16, group_size: 32, layers: [mlp]}, rtn: {scheme: w8a16, group_size: 32}",
            "compressed-tensors",
            "w4a16, w8a16: gptq holds layers of one scheme in a folder",
        ),
        ("gptq", f"{STAGE}, kv_cache: {{scheme: fp8}}", "compressed-tensors", "calibrated scales of the cache"),
        ("gptq", "rotate: {r4: true}, " + STAGE, "compressed-tensors", "inputs are rotated while the model runs"),
        ("gptq", f"{STAGE}, low_rank: {{rank: 4}}", "compressed-tensors", "adapter of low_rank"),
        ("awq", "allocate: {bits_per_weight: 4.5}, " + STAGE, "compressed-tensors", "allocate gives them several"),
    ],
)
def test_what_a_format_cannot_hold_is_an_error_of_the_plan(
    also: str, stage: str, form: str, said: str, tiny: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"x.yaml:.*{said}"):
        prepare(recipe(also, stage, form), model=str(tiny))


def test_scales_with_fewer_digits_are_refused_and_the_other_way_round_is_offered(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match=r"Use `checkpoint: \{format: gptq, also: \[compressed-tensors\]\}`"):
        prepare(recipe("gptq"), model=str(tmp_path / "model"))
    prepare(recipe("compressed-tensors", form="gptq"), model=str(tmp_path / "model"))


def test_the_resolved_recipe_says_what_else_was_asked_for() -> None:
    asked = recipe("gptq, gguf-q4_0")
    assert parse(dump(asked), "again.yaml") == asked


def test_a_plan_tells_of_it(tiny: Path) -> None:
    assert any(
        "converted to gptq, awq as well" in note
        for note in prepare(recipe("gptq, awq"), model=str(tiny)).to_json()["notes"]
    )


def test_a_plan_tells_what_gguf_holds_and_what_it_has_anew(tiny: Path) -> None:
    notes = prepare(recipe("gguf-q4_0, gguf-q4_k"), model=str(tiny)).to_json()["notes"]
    assert "gguf-q4_0: 21 layers keep their codes" in notes
    assert "gguf-q4_k: 0 layers keep their codes, 21 are quantized anew from them (21 as Q5_0)" in notes


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("exports") / "small"
    return output, compress.run(recipe("gptq, torchao, gguf-q4_0, gguf-q4_k"), model=str(tiny), output=output)


def test_each_format_has_the_codes_of_the_folder(written: tuple[Path, dict[str, Any]]) -> None:
    output, _ = written
    assert {path.name for path in output.parent.iterdir()} == {
        "small", "small.gptq", "small.torchao", "small.q4_0.gguf", "small.q4_k.gguf",
    }  # fmt: skip
    here = QuantizedWeights(read_folder(output))
    for name in ("gptq", "torchao"):
        there = QuantizedWeights(read_folder(place(output, name)))
        assert there.format.name == name
        assert all(here.quantized(layer).codes.equal(there.quantized(layer).codes) for layer in here.schemes)
    blocks = load_gguf(place(output, "gguf-q4_0"))
    assert all(torch.equal(blocks[f"{layer}.weight"], here.read(f"{layer}.weight")) for layer in here.schemes)


def test_the_report_says_what_was_written_and_what_was_quantized_anew(written: tuple[Path, dict[str, Any]]) -> None:
    output, report = written
    assert report == json.loads((output / "report.json").read_text())
    assert [(each["format"], each["exact"], each["requantized"]) for each in report["exports"]] == [
        ("gptq", 21, 0),
        ("torchao", 21, 0),
        ("gguf-q4_0", 21, 0),
        ("gguf-q4_k", 0, 21),
    ]
    for export in report["exports"]:
        there = Path(export["output"])
        assert there == place(output, export["format"])
        assert export["bytes"] == sum(
            file.stat().st_size for file in ([there] if there.is_file() else there.glob("*.safetensors"))
        )
    told = dict(line[::-1] for line in summary_lines(report) if line[0] == "also")
    assert any(
        line.startswith("small.q4_k.gguf: gguf-q4_k, ") and "21 layers quantized anew (21 as Q5_0)" in line
        for line in told
    )


def test_a_run_fits_what_gguf_has_anew_to_its_own_calibration_text(tiny: Path, text: Path, tmp_path: Path) -> None:
    asked = parse(
        f"calibration: {{dataset: {text}, samples: 128, sequence_length: 64}}\n"
        "stages: [gptq: {scheme: w4a16, group_size: 32, ignore: [lm_head]}]\n"
        "evaluation: {samples: 1}\ncheckpoint: {also: [gguf-q4_0, gguf-q4_1]}",
        "x.yaml",
    )
    report = compress.run(asked, model=str(tiny), output=tmp_path / "small")
    assert [(each["format"], each["exact"], each["requantized"]) for each in report["exports"]] == [
        ("gguf-q4_0", 21, 0),
        ("gguf-q4_1", 0, 21),
    ]
    fitted, alone = tmp_path / "fitted.gguf", tmp_path / "alone.gguf"
    converting.convert(tmp_path / "small", "gguf-q4_1", fitted, calibration=str(text))
    converting.convert(tmp_path / "small", "gguf-q4_1", alone)
    found, like, unlike = (load_gguf(file) for file in (tmp_path / "small.q4_1.gguf", fitted, alone))
    assert all(torch.equal(found[name], tensor) for name, tensor in like.items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in unlike.items())


def test_each_folder_has_a_card_of_its_own(written: tuple[Path, dict[str, Any]]) -> None:
    output, _ = written
    assert "- compressed-tensors" in (output / "README.md").read_text()
    assert (
        "Format: torchao; the codes are those that were scored." in (place(output, "torchao") / "README.md").read_text()
    )


def test_an_interrupted_run_makes_only_what_is_missing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, output = recipe("gptq, awq, torchao"), tmp_path / "small"
    real, made = converting.convert, []

    def counted(source: Any, to: str, place: Any, **options: Any) -> Any:
        made.append(to)
        if made == ["gptq", "awq"]:
            place.mkdir()  # as if it had been killed between two steps
            raise KeyboardInterrupt
        return real(source, to, place, **options)

    monkeypatch.setattr(converting, "convert", counted)
    with pytest.raises(KeyboardInterrupt):
        compress.run(asked, model=str(tiny), output=output)
    assert not output.exists()
    before = (tmp_path / "small.gptq" / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    report = compress.run(asked, model=str(tiny), output=output, resume=True)
    assert made == ["gptq", "awq", "awq", "torchao"]
    assert [export["format"] for export in report["exports"]] == ["gptq", "awq", "torchao"]
    assert (tmp_path / "small.gptq" / "model-00001-of-00004.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"small", "small.gptq", "small.awq", "small.torchao"}


def test_what_is_in_the_way_is_found_before_the_work_begins(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "small.q4_0.gguf").touch()
    with pytest.raises(OutputError, match=r"small.q4_0.gguf: exists already, and x.yaml:5:10 asks for gguf-q4_0 there"):
        compress.run(recipe("gguf-q4_0"), model=str(tiny), output=tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small.q4_0.gguf"]
    compress.run(recipe("gguf-q4_0"), model=str(tiny), output=tmp_path / "small", overwrite=True)
    assert (tmp_path / "small.q4_0.gguf").stat().st_size


def test_the_model_itself_is_never_overwritten(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "small.gptq")
    with pytest.raises(OutputError, match="is the model's own folder"):
        compress.run(recipe("gptq"), model=str(tmp_path / "small.gptq"), output=tmp_path / "small", overwrite=True)
    assert (tmp_path / "small.gptq" / "model.safetensors").exists()


def test_a_format_that_fails_after_all_costs_the_others_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales of 1e-9 are numbers of bfloat16, and not of float16: only the weights tell."""
    shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-7
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "x.yaml").write_text(dump(recipe("gptq, torchao")))
    arguments = [
        "run",
        str(tmp_path / "x.yaml"),
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path / "small"),
    ]
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert "small.gptq: was not written: model.layers.1.mlp.up_proj: its torch.bfloat16 scales" in told.err
    assert "partial" not in told.err
    assert "small.torchao: torchao" in told.out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "x.yaml", "small", "small.torchao"}
    assert "gptq: model.layers.1" in (tmp_path / "small" / "README.md").read_text().replace("\\", "")


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnx"), ("openvino", "onnx"), ("openvino", "openvino")])
def test_a_package_that_is_missing_is_said_before_the_run(
    tiny: Path, tmp_path: Path, without: Callable[[str], None], name: str, package: str
) -> None:
    recipe = parse(f"stages: [rtn: {{scheme: w4a16, group_size: 32}}]\ncheckpoint: {{also: [{name}]}}", "x.yaml")
    without(package)
    with pytest.raises(RequestError, match=rf"pip install 'netsuke\[{package}\]'"):
        exports.check(recipe, tmp_path / "out", tiny, resume=False, overwrite=False)
