"""What `from_pretrained` of transformers loads by netsuke is what `compress.load` loads."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import compress
from compress.checkpoint.compressed_tensors import CompressedTensors
from compress.checkpoint.weights import QuantizedWeights
from compress.core.affine import quantize
from compress.core.scheme import Grid
from compress.errors import ModelError
from compress.models.headers import read_folder
from compress.prune.sparsify import Sparsify
from compress.quantize.kv_cache import KVCache
from compress.quantize.low_rank import LowRank
from compress.quantize.rtn import RTN
from compress.recipe import Calibration, CheckpointOptions, Evaluation, Recipe
from compress.runtime import plugin
from compress.runtime.modules import Compensated, QuantLinear
from compress.runtime.sparse import SparseLinear

TOKENS = torch.arange(40).view(2, 20)
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def all_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the packages of other formats are installed."""
    monkeypatch.setattr(plugin, "takes", "all")


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three families: with an output head of its own and without, with biases and without."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(1)
    tied = Qwen2ForCausalLM(
        Qwen2Config(**SMALL, vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True)
    )
    for name, model in {
        "qwen": tied,
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=len(tokenizer))),
    }.items():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return {"llama": tiny, "qwen": place / "qwen", "neox": place / "neox"}


def run(model: Path, output: Path, *stages: Any, form: str = "gptq", calibration: Calibration | None = None) -> Path:
    recipe = Recipe(
        "packed",
        stages,
        checkpoint=CheckpointOptions(form),
        evaluation=Evaluation(samples=1),
        calibration=calibration or Calibration(),
    )
    compress.run(recipe, model=str(model), output=output)
    return output


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny, tmp_path_factory.mktemp("quantizer") / "packed", RTN("w4a16", 32))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


FOLDERS: dict[str, tuple[str, str, Any]] = {
    "llama 4 bits": ("llama", "gptq", RTN("w4a16", 32)),
    "llama 4 bits with zero points": ("llama", "awq", RTN("w4a16", 32, symmetric=False)),
    "llama 3 bits": ("llama", "compressed-tensors", RTN("w3a16", None, symmetric=False)),
    "qwen 8 bits": ("qwen", "gptq_v2", RTN("w8a16", 32, symmetric=False)),
    "qwen 8 bits, inputs too": ("qwen", "compressed-tensors", RTN("w8a8")),
    "llama 8 bits of torchao": ("llama", "torchao", RTN("w8a16", None)),
    "neox fp8, inputs too": ("neox", "compressed-tensors", RTN("fp8")),
}
"""Family, format and stage."""


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, form, stage = FOLDERS[request.param]
    return run(models[family], tmp_path_factory.mktemp("folder") / "out", stage, form=form)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_it_computes_bit_for_bit_what_our_own_loader_does_in_the_same_memory(
    folder: Path, dtype: torch.dtype | None
) -> None:
    ours, _ = compress.load(folder, dtype=dtype)
    theirs, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto" if dtype is None else dtype, output_loading_info=True
    )
    assert torch.equal(logits(theirs), logits(ours))
    assert theirs.get_memory_footprint() == ours.get_memory_footprint()
    names = [name for name, module in ours.named_modules() if isinstance(module, QuantLinear)]
    assert [name for name, module in theirs.named_modules() if isinstance(module, QuantLinear)] == names
    assert not any(told.values())


def test_it_generates_what_our_own_loader_does(packed: Path) -> None:
    ours, tokenizer = compress.load(packed)
    theirs = AutoModelForCausalLM.from_pretrained(packed)
    prompt = tokenizer("the carver", return_tensors="pt")
    texts = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_may_name_one_device_in_any_way(device_map: Any, packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, dtype=torch.float32)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {model.device.type}


def test_several_devices_are_refused(packed: Path, tmp_path: Path) -> None:
    several = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ModelError, match="packed layers are on one device, not on cpu, disk"):
        AutoModelForCausalLM.from_pretrained(packed, device_map=several | {"model.layers": "disk"})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_loaded_model_can_be_copied_and_pickled(duplicate: Any, packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(duplicate(model)), logits(model))


def test_saving_says_what_to_do_instead_and_writes_nothing(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(ModelError, match=f"Copy {packed}"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_config_goes_on_saying_what_the_folder_says(packed: Path, tmp_path: Path) -> None:
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert model.config.to_dict()["quantization_config"] == stored
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == stored


def test_the_body_alone_and_another_head_are_packed_too(packed: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(packed)
    body = AutoModel.from_pretrained(packed)
    hidden = [model(TOKENS).last_hidden_state for model in (whole.model, body)]
    assert torch.equal(*hidden)
    other = AutoModelForSequenceClassification.from_pretrained(packed)
    assert torch.equal(other.model(TOKENS).last_hidden_state, hidden[0])


def test_a_quantized_head_is_packed_where_the_model_has_one(tiny: Path, tmp_path: Path) -> None:
    folder = run(tiny, tmp_path / "out", RTN("w8a16", None), form="compressed-tensors")
    weights = QuantizedWeights(read_folder(folder))
    file = weights.tensors["lm_head.weight"].file
    scale = weights.read("lm_head.weight").abs().amax(1, keepdim=True) / 127
    head = quantize(weights.read("lm_head.weight"), scale, None, Grid(8))
    rest = {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    save_file(rest | CompressedTensors().encode("lm_head", head), file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("lm_head.weight", "lm_head.weight_packed"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(logits(model), logits(compress.load(folder)[0]))
    assert not hasattr(AutoModel.from_pretrained(folder), "lm_head")


def test_what_lies_beside_the_codes_comes_along(tiny: Path, text: Path, tmp_path: Path) -> None:
    calibration = Calibration(dataset=str(text), samples=4, sequence_length=32)
    stages = RTN("w4a16", 32), LowRank(rank=4), KVCache("fp8")
    folder = run(tiny, tmp_path / "out", *stages, form="compressed-tensors", calibration=calibration)
    model, ours = AutoModelForCausalLM.from_pretrained(folder), compress.load(folder)[0]
    assert any(isinstance(module, Compensated) for module in model.modules())
    assert torch.equal(logits(model), logits(ours))
    assert model.netsuke_kv_cache == ours.netsuke_kv_cache == "fp8"
    assert model.netsuke_kv_scales.keys() == ours.netsuke_kv_scales.keys()


def test_zeros_that_are_left_out_of_the_file_are_found_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    calibration = Calibration(dataset=str(text), samples=4, sequence_length=32)
    stage = Sparsify(pattern="2:4", method="magnitude")
    folder = run(tiny, tmp_path / "out", stage, form="sparse-24-bitmask", calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(compress.load(folder)[0]))


def test_codes_that_do_not_fit_are_refused_beside_what_transformers_said(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("optimum"):
        pytest.skip("optimum is installed, so that nothing is missing")
    monkeypatch.setattr(plugin, "takes", "missing")
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"qzeros: is .* expected .*transformers said: .*requires optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
