"""The stage `kv_cache`: what it promises to the plan, what it leaves in the folder, and that readers act on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

import compress
from compress.core.kv import heads_of, parse_kv_scheme
from compress.errors import RecipeError
from compress.inspection import inspect
from compress.pipeline import prepare
from compress.recipe import parse
from compress.runtime.cache import QuantizedCache


def recipe(*stages: str) -> Any:
    return parse("stages:\n" + "".join(f"  - {stage}\n" for stage in stages), "x.yaml")


def refusal(model: Path, *stages: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(*stages), model=str(model))
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    given = recipe("kv_cache: {scheme: kv8}")
    compress.run(given, model=str(tiny), output=output, calibration=str(text), overrides=["evaluation.samples=4"])
    return output


def test_weights_stay_as_they_are_and_the_config_names_the_scheme(tiny: Path, finished: Path) -> None:
    before = load_file(tiny / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in finished.glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((finished / "config.json").read_text())
    assert config["netsuke"] == {"kv_cache": {"scheme": "kv8"}}
    assert "quantization_config" not in config
    assert inspect(finished)["kv_cache"] == "kv8"


def test_it_is_scored_on_the_decode_path(finished: Path) -> None:
    """A forward pass over the whole text would find no difference at all."""
    text = json.loads((finished / "report.json").read_text())["evaluation"]["texts"][0]
    assert 1e-8 < text["kl_divergence"] < 0.01


def test_what_is_loaded_generates_with_that_cache(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = compress.load(finished, dtype=torch.float32)
    used: list[QuantizedCache] = []
    update = QuantizedCache.update

    def watched(self: QuantizedCache, *arguments: Any, **options: Any) -> Any:
        used.append(self)
        return update(self, *arguments, **options)

    monkeypatch.setattr(QuantizedCache, "update", watched)
    assert compress.generate(model, tokenizer, "the carver", max_new_tokens=4)
    assert used
    assert {layer.scheme.name for layer in used[0].layers} == {"kv8"}


def test_together_with_weights(tiny: Path, text: Path, tmp_path: Path) -> None:
    given = recipe("rtn: {scheme: w8a16, group_size: null}", "kv_cache: {scheme: kv8}")
    report = compress.run(
        given, model=str(tiny), output=tmp_path / "out", calibration=str(text), overrides=["evaluation.samples=2"]
    )
    assert 8 < report["bits_per_weight"] < 9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"netsuke", "quantization_config"} <= config.keys()


def test_the_plan_says_what_a_token_takes(tiny: Path) -> None:
    notes = prepare(recipe("kv_cache: {scheme: kv8}"), model=str(tiny)).notes
    assert "keys and values take 216 bytes a token, not 384" in notes


@pytest.mark.parametrize(("scheme", "shape"), [("fp8", (1,)), ("fp8-head", (2, 1, 1))])
@pytest.mark.parametrize("weights", [(), ("rtn: {scheme: w8a16, group_size: null}",)])
def test_fixed_scales_are_stored_as_engines_read_them(
    tiny: Path, text: Path, tmp_path: Path, scheme: str, shape: tuple[int, ...], weights: tuple[str, ...]
) -> None:
    given = recipe(*weights, f"kv_cache: {{scheme: {scheme}}}")
    small = ["calibration.samples=4", "calibration.sequence_length=32", "evaluation.samples=2"]
    report = compress.run(given, model=str(tiny), output=tmp_path / "out", calibration=str(text), overrides=small)
    assert 1e-8 < report["evaluation"]["texts"][0]["kl_divergence"] < 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "netsuke" not in config
    read = QuantizationConfig.model_validate(config["quantization_config"])
    assert read.kv_cache_scheme == QuantizationArgs(
        num_bits=8, type="float", symmetric=True, dynamic=False, strategy="tensor" if shape == (1,) else "attn_head"
    )
    assert len(read.config_groups) == len(weights)
    stored = {name: tensor for file in (tmp_path / "out").glob("*.safetensors")
              for name, tensor in load_file(file).items() if name.endswith(("k_scale", "v_scale"))}  # fmt: skip
    assert {*stored} == {f"model.layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("k_scale", "v_scale")}
    assert {(tuple(scale.shape), scale.dtype) for scale in stored.values()} == {(shape, torch.bfloat16)}
    assert inspect(tmp_path / "out")["kv_cache"] == scheme
    model, _ = compress.load(tmp_path / "out")
    assert model.netsuke_kv_cache == scheme
    expected = stored["model.layers.1.self_attn.v_scale"].float().view(-1).expand(2)
    assert torch.equal(model.netsuke_kv_scales[1][1], expected)
    assert torch.equal(compress.quantized_cache(model).layers[1].scales[1], expected)


def test_fixed_scales_need_a_format_that_holds_them(tiny: Path) -> None:
    given = parse("stages:\n  - kv_cache: {scheme: fp8}\ncheckpoint: {format: dense}\n", "x.yaml")
    with pytest.raises(RecipeError, match=r"x.yaml:2:5: scheme fp8 has calibrated scales, which .* dense cannot hold"):
        prepare(given, model=str(tiny))


def test_each_layer_gets_a_scheme_within_the_budget(wide: Path, text: Path, tmp_path: Path) -> None:
    given = recipe("kv_cache: {bits_per_number: 5, choices: [kv8, kv2], samples: 2}")
    small = ["calibration.samples=4", "calibration.sequence_length=48", "evaluation.samples=2"]
    report = compress.run(given, model=str(wide), output=tmp_path / "out", calibration=str(text), overrides=small)
    found = report["kv_cache"]
    kv_heads, head_dim = heads_of(json.loads((wide / "config.json").read_text()))
    taken = [parse_kv_scheme(name).token_bytes(head_dim) for name in found["schemes"]]
    assert kv_heads * sum(taken) == found["bytes"] <= found["budget_bytes"] == 5 * kv_heads * head_dim * len(taken) / 4
    assert set(found["schemes"]) == {"kv8", "kv2"}
    assert found["measured"]["allocated"] < found["measured"]["uniform"]
    for layer in found["sensitivity"]:
        assert 0 < layer["cost_by_scheme"]["kv8"] < layer["cost_by_scheme"]["kv2"]
    assert inspect(tmp_path / "out")["kv_cache"] == found["schemes"]
    model, tokenizer = compress.load(tmp_path / "out")
    assert [layer.scheme.name for layer in compress.quantized_cache(model).layers] == found["schemes"]
    assert compress.generate(model, tokenizer, "the carver", max_new_tokens=4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "kv8 throughout" in page
    assert "loss with kv2" in page


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (("kv_cache: {scheme: kv3}",), "unknown KV cache scheme 'kv3'; there are fp8, fp8-head, kv8"),
        (("kv_cache: {scheme: fp8}", "rtn: {scheme: w8a16}"), "of the compressed model; put it last"),
        (("kv_cache: {bits_per_number: 2, choices: [kv8, fp8]}",), "two or more different schemes, none of them fp8"),
        (("kv_cache: {}",), "give a scheme for all layers, as kv8, or bits_per_number and choices"),
        (("kv_cache: {scheme: kv8, bits_per_number: 4}",), "give a scheme for all layers, as kv8, or bits_per_number"),
        (("kv_cache: {scheme: kv8}", "kv_cache: {scheme: kv8}"), "x.yaml:3:5: one kv_cache holds for all layers"),
        (("kv_cache: {scheme: kv4}",), "x.yaml:2:5: head_dim=16 is not a multiple of 32, as scheme kv4 needs"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Path, stages: tuple[str, ...], told: str) -> None:
    assert told in refusal(tiny, *stages)


def test_a_budget_below_the_smallest_choice_is_refused(wide: Path) -> None:
    told = refusal(wide, "kv_cache: {bits_per_number: 2.5}")
    assert "x.yaml:2:5: bits_per_number=2.5 is less than the 3" in told


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert "it does not generate, and has no cache" in refusal(tmp_path, "kv_cache: {scheme: kv8}")
