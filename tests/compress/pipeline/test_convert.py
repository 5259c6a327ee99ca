from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.gguf import load as load_gguf
from compress.checkpoint.weights import QuantizedWeights, open_model
from compress.errors import DataError, ModelError, OutputError, RequestError
from compress.models.headers import read_folder
from compress.models.store import Weights, load_tokenizer
from compress.pipeline.convert import convert
from compress.quantize.kv_cache import KVCache
from compress.quantize.rtn import RTN
from compress.recipe import Calibration, CheckpointOptions, Evaluation, Recipe
from eval.divergence import kl_divergence


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit weights whose scales are float16's, in AWQ's layout."""
    output = tmp_path_factory.mktemp("convert") / "awq"
    recipe = Recipe("awq", (RTN("w4a16", 32),), checkpoint=CheckpointOptions("awq"), evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=output)
    return output


def logits(folder: Path) -> torch.Tensor:
    model = open_model(folder)
    with model.streamed():
        return model.logits(torch.arange(24).unsqueeze(0))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2"])
def test_another_format_holds_the_very_same_numbers(form: str, packed: Path, tmp_path: Path) -> None:
    told = convert(packed, form, tmp_path / "out")
    assert (told["format"], told["layers"]) == (form, 21)
    assert torch.equal(logits(tmp_path / "out"), logits(packed))
    convert(tmp_path / "out", "awq", tmp_path / "back")
    there, back = QuantizedWeights(read_folder(packed)), QuantizedWeights(read_folder(tmp_path / "back"))
    assert all(there.quantized(layer) == back.quantized(layer) for layer in there.schemes)
    assert read_folder(tmp_path / "back").config == read_folder(packed).config


def test_a_converted_run_has_a_card_in_its_own_words(packed: Path, tmp_path: Path) -> None:
    convert(packed, "gptq", tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text()
    assert "Format: gptq; the codes are those that were scored." in told
    (tmp_path / "out" / "report.json").write_text("{}")  # of something else
    convert(tmp_path / "out", "awq", tmp_path / "back")
    assert not (tmp_path / "back" / "README.md").exists()


def test_dense_is_an_ordinary_folder_of_what_the_codes_stand_for(packed: Path, tmp_path: Path) -> None:
    convert(packed, "dense", tmp_path / "out")
    codes, dense = QuantizedWeights(read_folder(packed)), Weights(read_folder(tmp_path / "out"))
    assert "quantization_config" not in dense.folder.config
    for layer in codes.schemes:
        assert torch.equal(dense.read(f"{layer}.weight"), codes.quantized(layer).dequantize(torch.float16))


def test_what_another_format_cannot_hold_is_refused_with_one_sentence_a_reason(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: bitsandbytes holds nf4 and w8a16") as refused:
        convert(packed, "bitsandbytes", tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_scales_of_bfloat16_are_numbers_of_float16_too(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe("w4a16", (RTN("w4a16", 32),), evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=tmp_path / "bf16")
    wide = convert(tmp_path / "bf16", "awq", tmp_path / "awq")  # bfloat16 has fewer digits: these fit
    assert wide["layers"] == 21


def test_nothing_is_written_where_the_request_is_wrong(tiny: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Did you mean 'gptq'"):
        convert(packed, "gpt", tmp_path / "out")
    with pytest.raises(ModelError, match="is not quantized"):
        convert(tiny, "awq", tmp_path / "out")
    with pytest.raises(OutputError, match="is the folder itself"):
        convert(packed, "gptq", packed, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_gguf_says_which_codes_it_kept(packed: Path, tiny: Path, tmp_path: Path) -> None:
    kept = convert(packed, "gguf-q4_0", tmp_path / "out")
    assert (kept["exact"], kept["requantized"], kept["output"]) == (21, 0, str(tmp_path / "out" / "model.gguf"))
    anew = convert(tiny, "gguf-q8_0", tmp_path / "model.gguf")
    assert (anew["exact"], anew["requantized"]) == (0, 21)
    with pytest.raises(OutputError, match="exists already"):
        convert(tiny, "gguf-q8_0", tmp_path / "model.gguf")
    with pytest.raises(RequestError, match="There are gguf-q4_0"):
        convert(tiny, "gguf-q9", tmp_path / "other")


@pytest.mark.parametrize("form", ["onnx", "onnx-a8"])
def test_onnx_is_a_whole_folder_with_the_same_codes(form: str, packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the package onnx")
    from compress.checkpoint import onnx_model

    told = convert(packed, form, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= files
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert (told["format"], told["layers"]) == (form, 21)
    assert told["bytes_after"] == sum((tmp_path / "out" / name).stat().st_size for name in files if ".onnx" in name)
    weights, back = QuantizedWeights(read_folder(packed)), onnx_model.load(tmp_path / "out")
    assert all(weights.quantized(layer).codes.equal(back[layer].codes) for layer in weights.schemes)


def test_a_graph_that_cannot_be_written_leaves_nothing(
    packed: Path, tiny: Path, tmp_path: Path, without: Callable[[str], None]
) -> None:
    recipe = Recipe("fp8", (RTN("fp8a16"),), evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=tmp_path / "fp8")
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: MatMulNBits holds integer weights") as refused:
        convert(tmp_path / "fp8", "onnx", tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ModelError, match="is not quantized"):
        convert(tiny, "onnx", tmp_path / "out")
    for package in ("openvino", "onnx"):
        without(package)
        with pytest.raises(RequestError, match=rf"pip install 'netsuke\[{package}\]'"):
            convert(packed, package, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def test_what_lies_beside_the_codes_is_not_dropped_in_silence(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = (RTN("w4a16", 32), KVCache("fp8"))
    calibration = Calibration(dataset=str(text), samples=2, sequence_length=32)
    recipe = Recipe("kv", stages, calibration=calibration, evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=tmp_path / "kv")
    for form in ("gptq", "gguf-q4_0", "onnx"):
        with pytest.raises(ModelError, match="calibrated scales of its KV cache"):
            convert(tmp_path / "kv", form, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_a_conversion_that_fails_or_is_killed_can_be_repeated(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "write_rest", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(packed, "gptq", tmp_path / "out")
    with pytest.raises(OutputError, match="drop it with --overwrite"):
        convert(packed, "gptq", tmp_path / "out")
    convert(packed, "gptq", tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_quantized_anew_are_fitted_to_a_text(tiny: Path, text: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.gguf", tmp_path / "fitted.gguf"
    convert(tiny, "gguf-q4_0", plain)
    convert(tiny, "gguf-q4_0", other, calibration=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted.gguf", "plain.gguf"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = load_tokenizer(tiny)(text.read_text()[:200], return_tensors="pt").input_ids[:, :64]

    def divergence(file: Path) -> float:
        state = model.state_dict()
        with torch.no_grad():
            before = model(tokens).logits
            model.load_state_dict(load_gguf(file), strict=False)
            after = model(tokens).logits
        model.load_state_dict(state)
        return kl_divergence(before, after).mean().item()

    assert divergence(other) < 0.8 * divergence(plain)


def test_layers_whose_codes_are_kept_are_not_fitted(packed: Path, text: Path, tmp_path: Path) -> None:
    convert(packed, "gguf-q4_0", tmp_path / "plain.gguf")
    found = convert(packed, "gguf-q4_0", tmp_path / "fitted.gguf", calibration=str(text))
    assert found["requantized"] == 0
    before, after = (load_gguf(tmp_path / f"{name}.gguf") for name in ("plain", "fitted"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_text_that_is_not_there_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.jsonl"):
        convert(tiny, "gguf-q4_0", tmp_path / "out", calibration=str(tmp_path / "missing.jsonl"))
    assert not list(tmp_path.iterdir())


def test_codes_as_they_are_need_no_text(packed: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="takes the codes as they are"):
        convert(packed, "gptq", tmp_path / "out", calibration=str(text))
    with pytest.raises(RequestError, match="--calibration: gguf-f16 quantizes nothing"):
        convert(packed, "gguf-f16", tmp_path / "out", calibration=str(text))
    assert not list(tmp_path.iterdir())
