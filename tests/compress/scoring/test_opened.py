"""Folders as models that are scored: which are streamed, and that one in memory answers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.cli import main
from compress.errors import ModelError
from compress.models.store import load_tokenizer
from compress.runtime.cache import QuantizedCache
from compress.scoring.opened import Resident, is_streamed, opened

TOKENS = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("quantization", "streamed"),
    [
        ({}, True),
        ({"quant_method": "compressed-tensors"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}}},
            True,
        ),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivation…"}}}, False),
        ({"quant_method": "quark"}, False),
    ],
)
def test_a_folder_is_streamed_where_netsuke_reads_its_format(quantization: dict[str, Any], streamed: bool) -> None:
    assert is_streamed(quantization) == streamed


def compressed(recipe: str, model: Path, output: Path) -> Path:
    options = ["--set", "rtn.group_size=32", "--set", "gates.max_perplexity_ratio=null"] if "rtn" in recipe else []
    assert main(["run", recipe, "--model", str(model), "--output", str(output), *options]) == 0
    return output


@pytest.mark.parametrize("recipe", [None, "w4a16-rtn", "kv8"])
def test_a_model_in_memory_has_the_logits_of_one_that_is_streamed(
    wide: Path, tmp_path: Path, recipe: str | None
) -> None:
    from eval.decode_path import DecodePath

    folder = compressed(recipe, wide, tmp_path / "out") if recipe else wide
    model = Resident(folder)
    with opened(folder) as streamed, torch.no_grad():
        expected = streamed(TOKENS)
        found = DecodePath(model, model.new_cache, step=None)(TOKENS) if model.new_cache else model(TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_only_a_checkpoint_that_quantizes_its_cache_brings_one(wide: Path, tmp_path: Path) -> None:
    assert Resident(wide).new_cache is None
    new_cache = Resident(compressed("kv8", wide, tmp_path / "out")).new_cache
    assert new_cache is not None
    assert isinstance(new_cache(), QuantizedCache)


def test_nothing_is_loaded_before_something_is_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("compress.runtime.load.load", load)
    model = Resident(tiny)
    assert model.config.vocab_size == 258
    with pytest.raises(AssertionError, match="loaded"):
        model(TOKENS)


def test_it_writes_what_transformers_would(tiny: Path) -> None:
    model = Resident(tiny)
    prompt = load_tokenizer(tiny)("every").input_ids
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert model.write(prompt, 12) == expected


def test_a_folder_that_its_own_loader_refuses_is_refused_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quark"}}))
    with pytest.raises(ModelError, match="transformers cannot load it: .*[Qq]uark"), opened(folder):
        pass
