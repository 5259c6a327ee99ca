"""What a GGUF file holds, told as of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli import main
from compress.errors import ModelError
from compress.inspection import inspect
from compress.models.headers import read_folder
from compress.pipeline.convert import convert


def test_a_gguf_file_tells_its_types_and_bits(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    convert(wide, "gguf-q8_0", file)
    found = inspect(file)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert (found["format"], found["family"], found["bytes"]) == ("gguf", "llama", file.stat().st_size)
    assert found["bits_per_weight"] == 8.5
    down = layers["blk.0.ffn_down"]
    assert (down["scheme"], down["group_size"]) == ("Q8_0", 32)
    assert down["shape"] == list(read_folder(wide).shapes["model.layers.0.mlp.down_proj.weight"])
    assert down["bytes"] == down["shape"][0] * down["shape"][1] // 32 * 34
    assert layers["output_norm"]["scheme"] is None
    assert main(["inspect", str(file)]) == 0
    assert "8.50 bits per quantized weight" in capsys.readouterr().out


def test_a_command_that_takes_folders_says_so_of_a_file(wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    convert(wide, "gguf-f32", file)
    with pytest.raises(ModelError, match="model.gguf: is a file. Give a folder with config.json"):
        read_folder(file)
