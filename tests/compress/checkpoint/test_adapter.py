"""The adapter's files: PEFT's names, the library's bytes, every product in its place from the beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint.adapter import (
    CONFIG,
    WEIGHTS,
    Product,
    adapter_config,
    adapter_layout,
    create_adapter,
    open_adapter,
    write_products,
)
from compress.errors import ModelError
from compress.models.headers import file_bytes

PRODUCTS: dict[str, Product] = {f"model.layers.{index}.mlp.up": (7, 3, 5) for index in range(11)} | {"head": (4, 3, 9)}
FIRST, LAST = "model.layers.0.mlp.up", "model.layers.10.mlp.up"


def factors(layer: str) -> tuple[Tensor, Tensor]:
    rows, rank, columns = PRODUCTS[layer]
    generator = torch.Generator().manual_seed(len(layer))
    return (
        torch.randn(rows, rank, generator=generator).bfloat16(),
        torch.randn(rank, columns, generator=generator).bfloat16(),
    )


def peft_name(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.lora_{factor}.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    create_adapter(tmp_path / "adapter", adapter_config(PRODUCTS, PRODUCTS), PRODUCTS)
    return tmp_path


def test_filled_block_by_block_it_is_the_file_that_the_library_would_have_written(checkpoint: Path) -> None:
    expected = {}
    for layer in reversed(PRODUCTS):
        write_products(checkpoint / "adapter", PRODUCTS, {layer: factors(layer)})
        A, B = factors(layer)
        expected |= {peft_name(layer, "A"): B, peft_name(layer, "B"): A}
    save_file(expected, checkpoint / "expected", metadata={"format": "pt"})
    assert (checkpoint / "adapter" / WEIGHTS).read_bytes() == (checkpoint / "expected").read_bytes()


def test_its_size_is_known_beforehand(checkpoint: Path) -> None:
    assert (checkpoint / "adapter" / WEIGHTS).stat().st_size == file_bytes(adapter_layout(PRODUCTS))


def test_a_layer_is_read_back_and_one_that_was_not_written_is_zero(checkpoint: Path) -> None:
    A, B = factors(LAST)
    write_products(checkpoint / "adapter", PRODUCTS, {LAST: (A.t().contiguous().t(), B)})
    adapter = open_adapter(checkpoint)
    assert adapter.products == PRODUCTS
    assert adapter.bytes[LAST] == 2 * (7 * 3 + 3 * 5)
    assert all(map(torch.equal, adapter.read(LAST), (A, B)))
    assert not any(factor.any() for factor in adapter.read(FIRST))


def test_a_folder_without_one_adds_nothing(tmp_path: Path) -> None:
    assert not open_adapter(tmp_path).products


def test_layers_are_targeted_by_a_name_where_it_means_no_other() -> None:
    given = {f"layers.{index}.{name}": (4, 2, 4) for index, name in [(0, "q"), (1, "q"), (0, "up")]}
    config = adapter_config(given, [*given, "layers", "layers.0", "layers.1", "layers.1.up"])
    assert config["target_modules"] == ["layers.0.up", "q"]
    assert config["lora_alpha"] / config["r"] == 1


def test_an_encoder_is_told_from_a_causal_model() -> None:
    assert adapter_config(PRODUCTS, [])["task_type"] == "CAUSAL_LM"
    assert adapter_config(PRODUCTS, [], causal=False)["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 6}, "r=3 and lora_alpha=6 differ.*Scale lora_B"),
        ({"use_dora": True}, "use_dora is True, only None or False can be read"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern is"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA'"),
    ],
)
def test_what_is_not_added_as_it_is_is_refused(change: dict[str, Any], message: str, checkpoint: Path) -> None:
    file = checkpoint / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        open_adapter(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({peft_name(FIRST, "B"): None}, r"lora_A \[3, 5\] and lora_B \[\], expected"),
        ({peft_name(FIRST, "B"): torch.zeros(7, 2)}, r"lora_A \[3, 5\] and lora_B \[7, 2\], expected"),
        ({peft_name(FIRST, "A"): torch.zeros(3, 5, dtype=torch.int8)}, "factors of I8 and BF16"),
        (
            {"base_model.model.head.lora_bias": torch.zeros(4)},
            "holds base_model.model.head.lora_bias, which is no factor",
        ),
    ],
)
def test_tensors_that_make_no_product_are_refused(
    change: dict[str, Tensor | None], message: str, checkpoint: Path
) -> None:
    file = checkpoint / "adapter" / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(ModelError, match=message):
        open_adapter(checkpoint)


def test_a_file_that_was_cut_off_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="adapter_model.safetensors: cannot be read"):
        open_adapter(checkpoint)
