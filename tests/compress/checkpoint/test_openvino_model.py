"""OpenVINO models: its CPU plugin computes from the written folder what netsuke computes from its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import compress
from compress.checkpoint import openvino_model
from compress.checkpoint.openvino_model import MODEL
from compress.checkpoint.weights import QuantizedWeights, open_model
from compress.errors import ModelError
from compress.models.headers import read_folder
from compress.quantize.rtn import RTN
from compress.recipe import Evaluation, Recipe

openvino = pytest.importorskip("openvino", reason="needs openvino")
pytest.importorskip("onnx", reason="needs the package onnx")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": "1"}


class Session:
    """OpenVINO's CPU plugin on a written folder; the cache is inside the model."""

    def __init__(self, folder: Path) -> None:
        self._request = openvino.Core().compile_model(folder / MODEL, "CPU", EXACT).create_infer_request()

    def start(self) -> Session:
        self._request.reset_state()
        return self

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, beams: list[int]) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given["beam_idx"] = torch.tensor(beams, dtype=torch.int32)
        found = self._request.infer({name: value.numpy() for name, value in given.items()})
        return torch.from_numpy(found["logits"].copy())


def exported(model: Path, output: Path, scheme: RTN) -> tuple[Path, Path]:
    """A quantized folder, and the same as an OpenVINO model."""
    quantized, folder = output / "quantized", output / "openvino"
    compress.run(Recipe("x", (scheme,), evaluation=Evaluation(samples=1)), model=str(model), output=quantized)
    folder.mkdir()
    openvino_model.export(QuantizedWeights(read_folder(quantized)), folder)
    return quantized, folder


def expected(folder: Path, ids: Tensor) -> Tensor:
    model = open_model(folder)
    with model.streamed():
        return model.logits(ids)


def difference(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def token_ids(length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 258, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "scheme",
    [
        RTN("w4a16", 32), RTN("w4a16", 32, symmetric=False), RTN("w8a16", None, symmetric=False),
        RTN("w3a16", None), RTN("w2a16", 16, symmetric=False), RTN("w5a16", 64),
    ],
    ids=["w4", "w4-asymmetric", "w8-channel-asymmetric", "w3-channel", "w2-asymmetric", "w5"],
)  # fmt: skip
def test_openvino_computes_what_we_do_from_the_same_codes(scheme: RTN, tiny: Path, tmp_path: Path) -> None:
    folder, graph = exported(tiny, tmp_path, scheme)
    ids, session = token_ids(20), Session(graph)
    right, ones, positions = expected(folder, ids), torch.ones_like(ids), torch.arange(20).unsqueeze(0)
    assert difference(session(ids, ones, positions, [0]), right) < 1e-5
    session.start()
    steps = [slice(0, 12), *(slice(at, at + 1) for at in range(12, 20))]
    found = [session(ids[:, step], ones[:, : step.stop], positions[:, step], [0]) for step in steps]
    assert difference(torch.cat(found, dim=1), right) < 1e-5
    weights, back = QuantizedWeights(read_folder(folder)), openvino_model.load(graph)
    assert back.keys() == weights.schemes.keys()
    for layer, tensor in back.items():
        before = weights.quantized(layer)
        assert torch.equal(tensor.codes, before.codes)
        assert torch.equal(tensor.dequantize(), before.dequantize())


def test_a_beam_goes_on_from_the_sequence_it_names(tiny: Path, tmp_path: Path) -> None:
    """Two sequences, the shorter padded on the left; then both go on from the second."""
    folder, graph = exported(tiny, tmp_path, RTN("w4a16", 32))
    long, short = token_ids(9), token_ids(6, seed=2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    session = Session(graph)
    found = session(torch.cat([long, torch.nn.functional.pad(short, (3, 0))]), mask, positions, [0, 1])
    assert difference(found[0], expected(folder, long)[0]) < 1e-5
    assert difference(found[1, 3:], expected(folder, short)[0]) < 1e-5
    following, mask = torch.tensor([[7], [11]]), torch.nn.functional.pad(mask[[1, 1]], (0, 1), value=1)
    found = session(following, mask, torch.full((2, 1), 6), [1, 1])
    for row in (0, 1):
        right = expected(folder, torch.cat([short, following[row : row + 1]], 1))
        assert difference(found[row, 0], right[0, -1]) < 1e-5


def test_biases_and_windows_are_in_the_graph(tiny: Path, tmp_path: Path) -> None:
    sizes = json.loads((tiny / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = Qwen2Config(
        **{key: sizes[key] for key in kept},
        num_hidden_layers=2, initializer_range=0.2, use_sliding_window=True, sliding_window=5, max_window_layers=1,
    )  # fmt: skip
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "model")
    folder, graph = exported(tmp_path / "model", tmp_path, RTN("w4a16", 32))
    ids = token_ids(20)
    found = Session(graph)(ids, torch.ones_like(ids), torch.arange(20).unsqueeze(0), [0])
    assert difference(found, expected(folder, ids)) < 1e-5


def test_a_pocket_llama_stays_in_four_bits(assets: Path, tmp_path: Path) -> None:
    folder, graph = exported(assets / "models/pocket-llama-13m", tmp_path, RTN("w4a16", 128))
    ids = torch.randint(8192, (1, 64), generator=torch.Generator().manual_seed(0))
    found = Session(graph)(ids, torch.ones_like(ids), torch.arange(64).unsqueeze(0), [0])
    assert difference(found, expected(folder, ids)) < 1e-5
    codes = sum(tensor.codes.numel() for tensor in openvino_model.load(graph).values())
    embeddings = 8192 * 384 * 2
    size = (graph / MODEL).with_suffix(".bin").stat().st_size
    assert embeddings + codes // 2 < size < 1.1 * (embeddings + codes // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda xml, data: data.write_bytes(data.read_bytes()[:-64]), "cannot be read"),
        (lambda xml, data: data.unlink(), "cannot be read"),
        (lambda xml, data: xml.write_text(xml.read_text()[:-200]), "cannot be read"),
        (
            lambda xml, data: xml.write_text(xml.read_text().replace(".q_proj.scales", ".q_proj.lost")),
            "q_proj.scales is",
        ),
        (
            lambda xml, data: xml.write_text(xml.read_text().replace('"64, 2, 32"', '"64, 2, 9999999999999"')),
            "cannot be",
        ),
        (lambda xml, data: xml.write_text(xml.read_text().replace('"64, 2, 32"', '"64, -2, 32"')), "cannot be"),
    ],
    ids=["short", "no weights", "half a graph", "no scales", "huge", "negative"],
)
def test_a_damaged_folder_is_refused(damage: Any, message: str, tiny: Path, tmp_path: Path) -> None:
    _, graph = exported(tiny, tmp_path, RTN("w4a16", 32))
    damage(graph / MODEL, (graph / MODEL).with_suffix(".bin"))
    with pytest.raises(ModelError, match=message):
        openvino_model.load(graph)
