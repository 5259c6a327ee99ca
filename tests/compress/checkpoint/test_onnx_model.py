"""ONNX models: onnxruntime computes from the written folder what netsuke computes from its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import compress
from compress.checkpoint import onnx_graph, onnx_model
from compress.checkpoint.onnx_file import DATA, GRAPH
from compress.checkpoint.weights import QuantizedWeights, open_model
from compress.errors import ModelError, VerificationError
from compress.models.headers import read_folder
from compress.quantize.rtn import RTN
from compress.recipe import Evaluation, Recipe

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 258, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-biased": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "yarn": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=YARN)),
    "linear": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=YARN | {"rope_type": "linear"})),
    "stray-window": (LlamaForCausalLM, LlamaConfig(**SIZES, sliding_window=5)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "mistral-window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}


class Session:
    """onnxruntime on a written folder, its cache carried from call to call."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=providers)
        self._names = [each.name for each in self._session.get_outputs()]
        self._past: dict[str, Any] = {}

    def start(self, batch: int) -> Session:
        for each in self._session.get_inputs():
            if each.name.startswith("past"):
                _, heads, _, channels = each.shape
                self._past[each.name] = torch.zeros(batch, heads, 0, channels).numpy()
        return self

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = self._session.run(None, {name: value.numpy() for name, value in given.items()} | self._past)
        named = dict(zip(self._names, found, strict=True))
        logits = torch.from_numpy(named.pop("logits"))
        self._past = {name.replace("present", "past_key_values"): value for name, value in named.items()}
        return logits


def quantized(model: Path, output: Path, scheme: RTN) -> Path:
    compress.run(Recipe("x", (scheme,), evaluation=Evaluation(samples=1)), model=str(model), output=output)
    return output


def exported(folder: Path, output: Path, **settings: Any) -> Path:
    weights = QuantizedWeights(read_folder(folder))
    assert onnx_model.problems(weights) == []
    output.mkdir()
    onnx_model.export(weights, output, **settings)
    return output


def random_model(family: str, tiny: Path, output: Path) -> Path:
    """A model of a family with random weights, biases and norms among them."""
    make, config = FAMILIES[family]
    shutil.copytree(tiny, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.manual_seed(0)
    model = make(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.bfloat16().save_pretrained(output)
    return output


def expected(folder: Path, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    model = open_model(folder)
    with model.streamed() as module, torch.inference_mode():
        return module(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def difference(found: Tensor, right: Tensor) -> float:
    """The largest, relative to the largest logit."""
    return float((found - right).abs().max() / right.abs().max())


def ordinary(length: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(2, 258, (1, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids), torch.arange(length).unsqueeze(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_computes_what_we_do(family: str, tiny: Path, tmp_path: Path) -> None:
    """A prompt, then token by token from its cache, is one pass over all."""
    folder = quantized(random_model(family, tiny, tmp_path / "model"), tmp_path / "w4", RTN("w4a16", 32))
    session = Session(exported(folder, tmp_path / "onnx"))
    ids, mask, positions = ordinary(20)
    right = expected(folder, ids, mask, positions)
    assert difference(session.start(1)(ids, mask, positions), right) < 1e-5
    session.start(1)
    steps = [slice(0, 12), *(slice(at, at + 1) for at in range(12, 20))]
    found = torch.cat([session(ids[:, step], mask[:, : step.stop], positions[:, step]) for step in steps], dim=1)
    assert difference(found, right) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_padding_changes_nothing_for_the_sequences_of_a_batch(
    family: str, side: str, tiny: Path, tmp_path: Path
) -> None:
    folder = quantized(random_model(family, tiny, tmp_path / "model"), tmp_path / "w4", RTN("w4a16", 32))
    session = Session(exported(folder, tmp_path / "onnx")).start(2)
    long, short = ordinary(12)[0], ordinary(7)[0].flip(1)
    pad = torch.zeros(1, 5, dtype=torch.long)
    parts = [pad, short] if side == "left" else [short, pad]
    ids, mask = torch.cat([long, torch.cat(parts, 1)]), torch.ones(2, 12, dtype=torch.long)
    mask[1] = torch.cat([torch.zeros_like(each) if each is pad else torch.ones_like(each) for each in parts], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = session(ids, mask, positions)
    alone = [expected(folder, each, torch.ones_like(each), torch.arange(each.shape[1])[None]) for each in (long, short)]
    real = mask.bool()
    assert difference(found[0], alone[0][0]) < 1e-5
    assert difference(found[1][real[1]], alone[1][0]) < 1e-5
    following, seen = torch.tensor([[5], [9]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    found = session(following, seen, mask.sum(1, keepdim=True))
    for row, before in enumerate((long, short)):
        whole = torch.cat([before, following[row : row + 1]], 1)
        last = expected(folder, whole, torch.ones_like(whole), torch.arange(whole.shape[1])[None])[0, -1]
        assert difference(found[row, -1], last) < 1e-5


@pytest.mark.parametrize(
    "scheme",
    [
        RTN("w4a16", 32, symmetric=False), RTN("w8a16", 64), RTN("w8a16", None, symmetric=False), RTN("w4a16", None),
        RTN("w3a16", 32), RTN("w2a16", 16, symmetric=False), RTN("w5a16", 64),
    ],
    ids=["w4-asymmetric", "w8", "w8-channel-asymmetric", "w4-channel", "w3", "w2-asymmetric", "w5"],
)  # fmt: skip
def test_every_grid_of_integers_runs_as_it_is(scheme: RTN, tiny: Path, tmp_path: Path) -> None:
    folder = quantized(tiny, tmp_path / "model", scheme)
    session = Session(exported(folder, tmp_path / "onnx")).start(1)
    inputs = ordinary(20)
    assert difference(session(*inputs), expected(folder, *inputs)) < 1e-5
    weights, back = QuantizedWeights(read_folder(folder)), onnx_model.load(tmp_path / "onnx")
    assert back.keys() == weights.schemes.keys()
    for layer, tensor in back.items():
        before = weights.quantized(layer)
        assert torch.equal(tensor.codes, before.codes)
        assert torch.equal(tensor.dequantize(), before.dequantize())


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("onnx") / "w4", RTN("w4a16", 32))


def test_a_pocket_llama_runs_in_onnxruntime(assets: Path, tmp_path: Path) -> None:
    folder = quantized(assets / "models/pocket-llama-13m", tmp_path / "w4", RTN("w4a16", 128))
    session = Session(exported(folder, tmp_path / "onnx"))
    ids = torch.randint(8192, (1, 64), generator=torch.Generator().manual_seed(0))
    inputs = ids, torch.ones_like(ids), torch.arange(64).unsqueeze(0)
    right = expected(folder, *inputs)
    assert difference(session.start(1)(*inputs), right) < 1e-5
    tied = 8192 * 384 * 2
    packed = sum(part.codes.numel() for part in onnx_model.load(tmp_path / "onnx").values()) // 2
    assert tied + packed < (tmp_path / "onnx" / DATA).stat().st_size < 1.1 * (tied + packed)  # one copy of embeddings


def test_the_file_is_onnx_to_its_own_checker(packed: Path, tmp_path: Path) -> None:
    onnx.checker.check_model(str(exported(packed, tmp_path / "onnx") / GRAPH), full_check=True)


def test_inputs_rounded_to_int8_are_a_setting_of_the_same_file(packed: Path, tmp_path: Path) -> None:
    exact, rounded = exported(packed, tmp_path / "exact"), exported(packed, tmp_path / "a8", int8_inputs=True)
    assert (exact / DATA).read_bytes() == (rounded / DATA).read_bytes()
    inputs = ordinary(20)
    assert difference(Session(rounded).start(1)(*inputs), expected(packed, *inputs)) < 0.1
    levels = [node.settings.get("accuracy_level") for node in onnx_model.CodesFile(rounded).layers.values()]
    assert levels == [4] * 21


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (GemmaForCausalLM, GemmaConfig(**SIZES), "GemmaForCausalLM cannot be written as a graph; LlamaForCausalLM"),
        (LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu' has no place"),
        (
            LlamaForCausalLM,
            LlamaConfig(**SIZES, rope_parameters=YARN | {"rope_type": "dynamic"}),
            "rope_type 'dynamic' depends on the length of the text",
        ),
    ],
    ids=["gemma", "gelu", "dynamic"],
)
def test_what_the_graph_would_compute_wrongly_is_refused(
    make: Any, config: Any, message: str, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    make(config).save_pretrained(tmp_path / "model")
    folder = quantized(tmp_path / "model", tmp_path / "w4", RTN("w4a16", 32))
    (problem,) = onnx_model.problems(QuantizedWeights(read_folder(folder)))
    assert message in problem


def test_a_parameter_without_a_place_in_the_graph_is_an_error(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph.Decoder, "_mlp", lambda self, name, hidden: hidden)
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj.weight: has no place in the graph"):
        exported(packed, tmp_path / "onnx")


def test_a_weight_that_does_not_read_back_is_an_error(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = onnx_model.to_operands

    def damaged(tensor: Any) -> Any:
        held = whole(tensor)
        held.codes[0, 0, 0] ^= 1
        return held

    monkeypatch.setattr(onnx_model, "to_operands", damaged)
    with pytest.raises(VerificationError, match="does not decode to what it was"):
        exported(packed, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.input.__setitem__(1, "absent"), "absent is missing"),
        (lambda node: node.input.append("absent"), "absent is missing"),
        (lambda node: node.attribute.pop(), "64 columns in blocks of 0"),
        (lambda node: setattr(node.attribute[0], "i", 1 << 40), r"expected \[.*\] of torch.uint8"),
        (lambda node: setattr(node.attribute[0], "i", -64), "-64 columns in blocks"),
        (lambda node: node.input.pop(), "has 2 inputs, 3 or 4 are expected"),
    ],
)
def test_a_damaged_graph_is_refused(change: Any, message: str, packed: Path, tmp_path: Path) -> None:
    folder = exported(packed, tmp_path / "onnx")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(next(node for node in model.graph.node if node.op_type == "MatMulNBits"))
    (folder / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=message):
        onnx_model.load(folder)
