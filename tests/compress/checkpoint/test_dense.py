from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from compress.checkpoint import FORMATS, CompressedTensors, Dense, format_for, format_of
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError

GRID = Grid(4, symmetric=False, group_size=32)


@dataclass(frozen=True)
class Options:
    format: str
    compression: str = "pack-quantized"


def tensor(dtype: torch.dtype) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-8, 8, (5, 2), dtype=torch.int8, generator=generator)
    return QuantizedTensor(codes, torch.randn(5, 2, generator=generator).to(dtype), zero_point, GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_the_dequantized_one_in_the_dtype_of_the_scale(dtype: torch.dtype) -> None:
    quantized = tensor(dtype)
    (weight,) = Dense().encode("layer", quantized).values()
    assert weight.dtype is dtype
    assert torch.equal(weight, quantized.dequantize(dtype))


def test_layout_promises_what_encode_writes() -> None:
    written = Dense().encode("layer", tensor(torch.bfloat16))["layer.weight"]
    assert Dense().layout("layer", (5, 64), Scheme(GRID), "BF16") == {"layer.weight": ("BF16", tuple(written.shape))}


def test_a_dense_folder_has_no_quantization_config() -> None:
    assert Dense().quantization_config({"layer": Scheme(GRID)}, []) is None


def test_any_kind_of_layer_is_welcome() -> None:
    assert Dense().problems("layer", "Conv1D", (5, 64), Scheme(GRID)) == []


def test_rounded_inputs_are_not() -> None:
    (problem,) = Dense().problems("layer", "Linear", (5, 64), Scheme(GRID, Grid(8)))
    assert "cannot say that w4a8 rounds inputs" in problem


def test_codes_cannot_be_read_back() -> None:
    with pytest.raises(ModelError, match="layer: is stored as ordinary weights"):
        Dense().decode("layer", {}, GRID)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_answers_to_the_name_it_is_listed_under(name: str) -> None:
    assert format_for(Options(name)).name == name


def test_the_compression_of_a_recipe_reaches_the_format() -> None:
    options = Options("compressed-tensors", "int-quantized")
    assert format_for(options) == CompressedTensors("int-quantized")


def test_a_folder_without_quantization_config_is_dense() -> None:
    assert format_of({"model_type": "llama"}) == Dense()


def test_a_folder_is_read_by_its_quant_method() -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert format_of(config) == CompressedTensors()


def test_an_unknown_quant_method_is_named() -> None:
    with pytest.raises(ModelError, match="quant_method 'quark' cannot be read, only compressed-tensors"):
        format_of({"quantization_config": {"quant_method": "quark"}})
