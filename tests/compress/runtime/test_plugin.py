"""Which folders transformers hands to netsuke, in fresh processes where imports are what is tested."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPTQConfig, modeling_utils
from transformers.quantizers import auto

import compress
from compress.quantize.rtn import RTN
from compress.recipe import CheckpointOptions, Evaluation, Recipe
from compress.runtime import plugin
from compress.runtime.quantizer import PackedQuantizer, runs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 4-bit weights in formats whose packages are not installed here, and in one whose package may be."""
    if any(importlib.util.find_spec(name) for name in ("optimum", "gptqmodel")):
        pytest.skip("optimum or gptqmodel is installed, so that nothing is missing")
    place = tmp_path_factory.mktemp("plugin")
    for name in ("gptq", "awq", "compressed-tensors"):
        options = {"checkpoint": CheckpointOptions(name), "evaluation": Evaluation(samples=1)}
        compress.run(Recipe(name, (RTN("w4a16", 32),), **options), model=str(tiny), output=place / name)
    return {name: place / name for name in ("gptq", "awq", "compressed-tensors")}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    plugin.takes = "missing"


def in_a_fresh_python(code: str, folder: Path) -> list[str]:
    """The lines that some code prints, which has a `folder`."""
    whole = f"folder = {str(folder)!r}\n{code}"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", whole], cwd=ROOT, env=offline, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
print(sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}))
"""
PACKED = ["['Linear', 'QuantLinear', 'SharedLinear']"]  # the output head stays as it was


@pytest.mark.parametrize(
    "imports",
    [
        "import compress, transformers",
        "import transformers.modeling_utils, compress, transformers",
        "import compress, transformers.quantizers.auto, compress.runtime.load, transformers",
    ],
)
def test_a_folder_whose_package_is_missing_loads_packed_in_any_order_of_imports(
    imports: str, packed: dict[str, Path]
) -> None:
    assert in_a_fresh_python(imports + LOAD, packed["gptq"]) == PACKED


def test_a_folder_loads_packed_where_compressed_tensors_is_not_installed(packed: dict[str, Path]) -> None:
    hidden = "import sys\nsys.modules['compressed_tensors'] = None\nimport compress, transformers\n"
    assert in_a_fresh_python(hidden + LOAD, packed["compressed-tensors"]) == PACKED


def test_without_netsuke_transformers_stops_at_the_missing_package(packed: dict[str, Path]) -> None:
    """Or the tests above would show nothing."""
    code = "import transformers\ntry:" + LOAD.replace("\n", "\n    ") + "\nexcept ImportError as error: print(error)"
    (said,) = in_a_fresh_python(code, packed["gptq"])
    assert "requires optimum" in said


def test_what_transformers_can_load_it_goes_on_loading(packed: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(packed["compressed-tensors"])
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    plugin.takes = "all"
    assert isinstance(AutoModelForCausalLM.from_pretrained(packed["compressed-tensors"]).hf_quantizer, PackedQuantizer)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_switched_off_there_is_no_netsuke(name: str, packed: dict[str, Path]) -> None:
    plugin.takes = "nothing"
    with pytest.raises(ImportError, match="requires"):
        AutoModelForCausalLM.from_pretrained(packed[name])


@pytest.mark.parametrize("takes", ["missing", "all"])
def test_a_wish_about_transformers_own_quantizer_is_left_to_it(takes: Any, packed: dict[str, Path]) -> None:
    plugin.takes = takes
    with pytest.raises(ImportError, match="requires optimum"), pytest.warns(UserWarning, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(packed["gptq"], quantization_config=GPTQConfig(bits=4))


def test_an_ordinary_folder_and_a_new_quantization_are_not_looked_at(tiny: Path) -> None:
    plugin.takes = "all"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert getattr(model, "hf_quantizer", None) is None
    with pytest.raises(ImportError, match="requires optimum"):
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=GPTQConfig(bits=4))


@pytest.mark.parametrize("takes", ["missing", "all"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"quant_method": "quark"}, "quark"),
        ({"desc_act": True, "act_group_aware": False}, "requires optimum"),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "requires optimum"),
    ],
)
def test_what_our_runtime_does_not_know_is_refused_by_transformers_in_its_words(
    takes: Any, words: dict[str, Any], said: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    plugin.takes = takes
    shutil.copytree(packed["gptq"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= words
    file.write_text(json.dumps(config))
    with pytest.raises(ImportError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_second_import_does_nothing() -> None:
    asked, watchers = auto.get_hf_quantizer, [each for each in sys.meta_path if isinstance(each, plugin.Watcher)]
    plugin.install()
    importlib.reload(compress)
    assert auto.get_hf_quantizer is modeling_utils.get_hf_quantizer is asked
    assert not hasattr(asked.__wrapped__, "__wrapped__")
    assert [each for each in sys.meta_path if isinstance(each, plugin.Watcher)] == watchers
    assert len(watchers) == 1


def test_a_config_tells_what_we_run() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": fp8}}
    assert runs({"quant_method": "compressed-tensors", "config_groups": groups})
    assert not runs({"quant_method": "compressed-tensors", "config_groups": None})
    assert runs({"quant_method": "gptq", "bits": 4})
    assert not runs({"quant_method": "gptq", "bits": 5})
    assert not runs({"quant_method": "aqlm"})
    assert not runs({"quant_method": "bitsandbytes", "load_in_4bit": True})  # LoRA trains on its layers, not on ours
