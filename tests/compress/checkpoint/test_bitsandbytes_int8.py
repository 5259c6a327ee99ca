from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import compress
from compress.checkpoint.bitsandbytes import BitsAndBytes
from compress.checkpoint.bitsandbytes_int8 import INT8, SCALE_DTYPE, decode_int8, encode_int8
from compress.checkpoint.weights import open_model
from compress.core.affine import quantize
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Scheme
from compress.errors import ModelError
from compress.inspection import inspect
from compress.models.store import DTYPES
from compress.quantize.rtn import rtn
from compress.recipe import parse

NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENS = torch.arange(2, 42).view(2, 20)


def weight(rows: int = 96, columns: int = 172) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def int8(w: Tensor, scale_dtype: torch.dtype = SCALE_DTYPE) -> QuantizedTensor:
    return rtn(w, INT8, scale_dtype=scale_dtype, range="minmax")


class TestLayer:
    @pytest.mark.parametrize("shape", [(1, 1), (96, 172), (1000, 33)], ids=str)
    def test_what_is_decoded_is_what_was_encoded(self, shape: tuple[int, int]) -> None:
        tensor = int8(weight(*shape))
        assert BitsAndBytes().decode("a.b", BitsAndBytes().encode("a.b", tensor), INT8) == tensor

    def test_every_bfloat16_is_a_scale_that_is_given_back(self) -> None:
        scale = torch.arange(0x0080, 0x7B80, dtype=torch.int16).view(torch.bfloat16)  # the normal ones below 2^120
        scale = torch.cat([scale, -scale]).unsqueeze(1)
        tensor = QuantizedTensor(torch.ones(len(scale), 1, dtype=torch.int8), scale, None, INT8)
        assert decode_int8(encode_int8(tensor)) == tensor

    def test_of_float32_scales_one_in_a_hundred_is_the_quotient_of_no_float32(self) -> None:
        scale = 1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0))
        near = scale * 127
        candidates = torch.stack([near, *(torch.nextafter(near, torch.tensor(end)) for end in (0.0, torch.inf))])
        lost = ~(candidates / 127 == scale).any(dim=0)
        assert 0.01 < lost.float().mean() < 0.014

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_such_scales_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(ModelError, match=rf"^a: scales are {dtype}, expected torch\.bfloat16"):
            BitsAndBytes().encode("a", int8(weight(), dtype))

    def test_scales_rounded_to_bfloat16_cost_next_to_nothing(self) -> None:
        w = weight()
        exact, rounded = ((int8(w, dtype).dequantize() - w).norm() for dtype in (torch.float32, torch.bfloat16))
        assert rounded < 1.01 * exact

    @pytest.mark.parametrize("shape", [(1, 64), (96, 172)], ids=str)
    def test_layout_promises_what_encode_writes(self, shape: tuple[int, int]) -> None:
        written = BitsAndBytes().encode("a.b", int8(weight(*shape)))
        found = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()}
        assert BitsAndBytes().layout("a.b", shape, Scheme(INT8), "F32") == found

    def test_the_largest_of_a_row_is_what_others_store_and_is_read_as_float32(self) -> None:
        w = weight()
        largest = w.abs().amax(dim=1)
        codes = quantize(w, largest.unsqueeze(1) / 127, None, INT8).codes
        read = decode_int8({"weight": codes, "SCB": largest})
        assert read.scale.dtype == torch.float32
        assert torch.allclose(read.dequantize().abs().amax(dim=1), largest, rtol=2e-7)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"SCB": torch.ones(95)}, r"SCB is \[95\] of torch\.float32, expected \[96\] of torch\.float32"),
            ({"SCB": torch.ones(96, dtype=torch.bfloat16)}, r"SCB is \[96\] of torch\.bfloat16, expected"),
            ({"weight": torch.zeros(96, 172)}, r"weight is \[96, 172\] of torch\.float32, expected \[out, in\] of"),
            ({"weight": torch.zeros(96, dtype=torch.int8)}, r"weight is \[96\] of torch\.int8, expected \[out, in\]"),
            ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2; only 0, codes row by row"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read_is_named(self, changed: dict[str, Tensor], message: str) -> None:
        written = {f"a.{leaf}": tensor for leaf, tensor in (encode_int8(int8(weight())) | changed).items()}
        with pytest.raises(ModelError, match=f"^a: {message}"):
            BitsAndBytes().decode("a", written, INT8)

    @pytest.mark.parametrize("leaf", ["weight", "SCB"])
    def test_a_missing_tensor_is_named(self, leaf: str) -> None:
        written = BitsAndBytes().encode("a", int8(weight()))
        del written[f"a.{leaf}"]
        with pytest.raises(ModelError, match=f"a: {leaf} is missing"):
            BitsAndBytes().decode("a", written, INT8)


@pytest.fixture(scope="module")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights in float32, whose scales must be rounded to be stored."""
    folder = tmp_path_factory.mktemp("float32")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That in int8, one layer left as it was."""
    stage = "rtn: {scheme: w8a16, group_size: null, ignore: ['*.0.mlp.down_proj']}"
    text = f"stages:\n- {stage}\ncheckpoint: {{format: bitsandbytes}}\n"
    output = tmp_path_factory.mktemp("int8") / "out"
    compress.run(parse(text, "x.yaml"), model=str(original), output=output)
    return output


def expected(folder: Path) -> Tensor:
    """The logits of the folder, streamed."""
    model = open_model(folder)
    with model.streamed():
        return model.logits(TOKENS)


class TestFolder:
    def test_it_runs_as_it_streams(self, folder: Path) -> None:
        model, _ = compress.load(folder)
        assert torch.allclose(model(TOKENS).logits, expected(folder), rtol=0, atol=2e-5)

    def test_it_computes_nearly_what_the_original_does(self, folder: Path, original: Path) -> None:
        exact = expected(original)
        assert 0 < (expected(folder) - exact).norm() < 0.05 * exact.norm()

    def test_inspection_tells_its_layers_and_shapes(self, folder: Path) -> None:
        layers = {layer["name"]: layer for layer in inspect(folder)["layers"]}
        quantized, kept = (layers[f"model.layers.{index}.mlp.down_proj"] for index in (1, 0))
        assert (quantized["scheme"], quantized["shape"], quantized["group_size"]) == ("w8a16", [64, 128], None)
        assert quantized["bytes"] == 64 * 128 + 64 * 4 + 1
        assert (kept["dtype"], kept["scheme"]) == ("F32", None)


class TestBesideBitsandbytes:
    """What transformers and the package itself make of it, where that is installed."""

    @pytest.fixture
    def functional(self) -> Any:
        return pytest.importorskip("bitsandbytes.functional")

    def test_transformers_loads_it_and_has_exactly_our_weights(self, functional: Any, folder: Path) -> None:
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values())
        assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
        weights = open_model(folder).weights
        for name in BitsAndBytes().schemes({}, weights.tensors):
            layer = model.get_submodule(name)
            assert type(layer).__name__ == "Linear8bitLt"
            stored = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            assert torch.equal(stored, weights.read(f"{name}.weight"))

    def test_without_rounded_inputs_transformers_computes_our_logits(self, functional: Any, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
        with torch.no_grad():
            assert torch.allclose(model(TOKENS).logits, expected(folder), rtol=0, atol=1e-5)

    def test_rounded_inputs_change_them_a_little(self, functional: Any, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            theirs, ours = model(TOKENS).logits, expected(folder)
        assert 0 < (theirs - ours).norm() < 0.05 * ours.norm()

    def test_what_transformers_stores_is_read_as_it_reads_it(
        self, functional: Any, original: Path, tmp_path: Path
    ) -> None:
        config = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
        model.save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
        with torch.no_grad():
            assert torch.allclose(theirs(TOKENS).logits, expected(tmp_path), rtol=0, atol=1e-4)
