from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import ModelError
from compress.models.headers import canonical, file_bytes, read_folder
from compress.models.llama import LLAMA
from compress.models.store import Weights, read_tensor

SAVED_AS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def entries(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (SAVED_AS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_predicted_file_size_is_the_size_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight_packed": torch.zeros(3, 5, dtype=torch.int32),
        "a.weight": torch.zeros(7, 11, dtype=torch.bfloat16),
        "b.weight_shape": torch.zeros(2, dtype=torch.int64),
        "norm": torch.zeros(13),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert file_bytes(entries(tensors)) == (tmp_path / "x.safetensors").stat().st_size


def test_tensors_are_laid_out_in_the_order_of_their_types(tmp_path: Path) -> None:
    """Which shows in the size: what comes first has shorter offsets."""
    for size in (3, 30, 300, 3000):
        for types in ((a, b) for a in SAVED_AS for b in SAVED_AS):
            tensors = {"a": torch.zeros(5).to(types[0]), "b": torch.zeros(size).to(types[1])}
            save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
            assert file_bytes(entries(tensors)) == (tmp_path / "x.safetensors").stat().st_size, types


def test_headers_give_the_bytes_of_each_tensor(tiny: Path) -> None:
    folder = read_folder(tiny)
    weights = Weights(folder)
    assert folder.bytes == (tiny / "model.safetensors").stat().st_size
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = weights.read(name)
    assert tensor.shape == (64, 128)
    assert tensor.dtype == torch.bfloat16
    assert read_tensor(folder.tensors[name]).std().item() == pytest.approx(0.2, rel=0.1)


def test_a_missing_folder_says_what_a_model_folder_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such model folder.*config\.json"):
        read_folder(tmp_path / "nowhere")


def test_a_cut_off_file_is_told_but_its_headers_are_read(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:50_000])
    folder = read_folder(tmp_path)
    assert "is cut off, 50,000 of" in folder.truncated[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff" * 8 + b"{}", "is no whole safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "header is damaged"),
        (b"\x03", "is no whole safetensors file"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        read_folder(tmp_path)


def test_offsets_that_disagree_with_a_shape_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"x has shape \[4\] of F32 but bytes 0…8"):
        read_folder(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lies outside the folder"):
        read_folder(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        read_folder(tmp_path)


def test_names_without_the_module_prefix_get_it(tiny: Path) -> None:
    tensors = read_folder(tiny).tensors
    bare = {name.removeprefix("model."): header for name, header in tensors.items()}
    assert set(canonical(bare, LLAMA)) == set(tensors)
