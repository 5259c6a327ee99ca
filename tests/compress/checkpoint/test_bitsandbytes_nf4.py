from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.bitsandbytes import BitsAndBytes
from compress.checkpoint.bitsandbytes_nf4 import STATE, decode_nf4, encode_nf4, pack_nibbles, read_state
from compress.checkpoint.weights import open_model
from compress.core.floats import quantize_float
from compress.core.normal_float import NESTED_BLOCK, TINY, NestedScales, block_maximum, dynamic_map
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import NF4, Scheme
from compress.errors import ModelError
from compress.inspection import inspect
from compress.models.store import DTYPES
from compress.recipe import parse

NAMES = {dtype: name for name, dtype in DTYPES.items()}
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOKENS = torch.arange(2, 42).view(2, 20)


def nest(scale: Tensor) -> NestedScales:
    """Scales as others quantize them in turn."""
    flat, mean = scale.float().flatten(), scale.float().mean()
    padded = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(dim=1)
    relative = (padded * (1 / largest.clamp(min=TINY)).unsqueeze(1)).flatten()[: flat.numel()]
    levels = dynamic_map(scale.device)
    codes = torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return NestedScales(codes.view(scale.shape), largest, float(mean))


def weight(rows: int = 96, columns: int = 320, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).to(dtype)


def nf4(w: Tensor) -> QuantizedTensor:
    """By the largest of each block, as bitsandbytes has it."""
    return quantize_float(w, NF4, w.dtype, search=False)


def state_of(fields: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def nested(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], NestedScales]:
    """A layer as others store it, with scales quantized in turn, and these."""
    stored, scales = encode_nf4(tensor), nest(tensor.scale)
    state = read_state(stored[STATE])[2] | {"nested_blocksize": NESTED_BLOCK, "nested_offset": scales.mean}
    stored |= {"weight.absmax": scales.codes.flatten(), "weight.nested_absmax": scales.largest, STATE: state_of(state)}
    return stored | {"weight.nested_quant_map": dynamic_map(torch.device("cpu"))}, scales


def test_the_first_of_two_codes_is_the_high_nibble() -> None:
    codes = torch.tensor([[0, 1, 15, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x01], [0xF8]]


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] is an odd number of codes"):
        pack_nibbles(torch.zeros(1, 3, dtype=torch.uint8))


class TestLayer:
    @EVERY_DTYPE
    def test_what_is_decoded_is_what_was_encoded(self, dtype: torch.dtype) -> None:
        tensor = nf4(weight(dtype=dtype))
        assert tensor.scale.dtype == dtype
        assert BitsAndBytes().decode("a.b", BitsAndBytes().encode("a.b", tensor), NF4) == tensor

    @EVERY_DTYPE
    @pytest.mark.parametrize("shape", [(1, 64), (96, 320), (1000, 128)], ids=str)
    def test_layout_promises_what_encode_writes(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        written = BitsAndBytes().encode("a.b", nf4(weight(*shape, dtype=dtype)))
        found = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()}
        assert BitsAndBytes().layout("a.b", shape, Scheme(NF4), NAMES[dtype]) == found

    def test_nested_scales_are_read_as_float32(self) -> None:
        tensor = nf4(weight(300, 1024, torch.bfloat16))
        stored, scales = nested(tensor)
        read = decode_nf4(stored)
        assert torch.equal(read.codes, tensor.codes)
        assert torch.equal(read.scale, scales.dequantize())

    def test_scales_that_their_dtype_does_not_hold_are_read_as_float32(self) -> None:
        stored = encode_nf4(nf4(weight(dtype=torch.bfloat16)))
        stored["weight.absmax"] = stored["weight.absmax"] * 1.001
        assert torch.equal(decode_nf4(stored).scale.flatten(), stored["weight.absmax"])

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "are not the levels of NF4"),
            ({"weight.absmax": torch.ones(481)}, r"weight\.absmax is 481 of torch\.float32, expected 480 of"),
            ({"weight": torch.zeros(7680, 1, dtype=torch.bfloat16)}, r"weight is 7680 of torch\.bfloat16, expected"),
            ({"weight.nested_absmax": torch.ones(2)}, r"weight\.absmax is 480 .*, expected 480 of .*uint8"),
            ({STATE: {"blocksize": 128}}, "rows of 320 columns in blocks of 128 cannot be read, only"),
            ({STATE: {"shape": [320, 96]}}, "rows of 96 columns in blocks of 64 cannot be read"),
            ({STATE: {"shape": [320]}}, r"has shape \[320\], expected two sizes"),
            ({STATE: {"dtype": "int8"}}, "says 'int8', expected one of float32, float16, bfloat16"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read_is_named(self, changed: dict[str, Any], message: str) -> None:
        stored = encode_nf4(nf4(weight()))
        if STATE in changed:
            changed = {STATE: state_of(read_state(stored[STATE])[2] | changed[STATE])}
        written = {f"a.{leaf}": tensor for leaf, tensor in (stored | changed).items()}
        with pytest.raises(ModelError, match=f"^a: .*{message}"):
            BitsAndBytes().decode("a", written, NF4)

    @pytest.mark.parametrize("leaf", ["weight", "weight.absmax", "weight.quant_map", STATE])
    def test_a_missing_tensor_is_named(self, leaf: str) -> None:
        written = BitsAndBytes().encode("a", nf4(weight()))
        del written[f"a.{leaf}"]
        with pytest.raises(ModelError, match=f"a: {leaf} is missing"):
            BitsAndBytes().decode("a", written, NF4)

    def test_other_nested_scales_are_refused(self) -> None:
        stored, _ = nested(nf4(weight()))
        with pytest.raises(ValueError, match="nested_quant_map is not bitsandbytes' own"):
            decode_nf4(stored | {"weight.nested_quant_map": torch.linspace(-1, 1, 256)})


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in NF4, one layer left as it was."""
    text = "stages:\n- rtn: {scheme: nf4, ignore: ['*.0.mlp.down_proj']}\ncheckpoint: {format: bitsandbytes}\n"
    output = tmp_path_factory.mktemp("nf4") / "out"
    compress.run(parse(text, "x.yaml"), model=str(tiny), output=output)
    return output


def expected(folder: Path) -> Tensor:
    """The logits of the folder, streamed."""
    model = open_model(folder)
    with model.streamed():
        return model.logits(TOKENS)


class TestFolder:
    def test_it_runs_as_it_streams(self, folder: Path) -> None:
        model, _ = compress.load(folder, dtype=torch.float32)
        assert torch.allclose(model(TOKENS).logits, expected(folder), rtol=0, atol=1e-5)

    def test_it_runs_in_bfloat16_near_that(self, folder: Path) -> None:
        model, _ = compress.load(folder)
        exact = expected(folder)
        assert model.dtype == torch.bfloat16
        assert (model(TOKENS).logits - exact).norm() < 0.05 * exact.norm()

    def test_layers_of_one_input_run_as_one_and_keep_four_bits(self, folder: Path) -> None:
        block = compress.load(folder)[0].model.layers[1]
        assert block.self_attn.q_proj.shared is block.self_attn.v_proj.shared
        assert block.mlp.down_proj.packed.codes.nbytes == 64 * 128 // 2
        assert torch.equal(block.mlp.down_proj.dequantize(), open_model(folder).weights.read(
            "model.layers.1.mlp.down_proj.weight"
        ))  # fmt: skip

    def test_inspection_tells_its_layers_and_shapes(self, folder: Path) -> None:
        layers = {layer["name"]: layer for layer in inspect(folder)["layers"]}
        quantized, kept = (layers[f"model.layers.{index}.mlp.down_proj"] for index in (1, 0))
        assert (quantized["dtype"], quantized["shape"], quantized["group_size"]) == ("nf4", [64, 128], 64)
        assert quantized["bytes"] > 64 * 128 // 2 + 64 * 2 * 4
        assert (kept["dtype"], kept["scheme"]) == ("BF16", None)

    def test_transformers_loads_it_and_computes_with_our_weights(self, folder: Path) -> None:
        pytest.importorskip("bitsandbytes")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        layers = model.model.layers
        assert type(layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
        assert type(layers[0].mlp.down_proj) is torch.nn.Linear
        with torch.no_grad():
            theirs, ours = model(TOKENS).logits, expected(folder)
        assert (theirs - ours).norm() < 0.02 * ours.norm()


class TestBesideBitsandbytes:
    """What the package itself computes, where it is installed."""

    @pytest.fixture
    def functional(self) -> Any:
        return pytest.importorskip("bitsandbytes.functional")

    @EVERY_DTYPE
    def test_nf4_is_stored_to_the_byte_as_it_stores_it(self, functional: Any, dtype: torch.dtype) -> None:
        w = weight(dtype=dtype)
        packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type="nf4")
        theirs = {"weight": packed} | {f"weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
        ours = encode_nf4(nf4(w))
        assert set(ours) == set(theirs)
        for leaf in ours:
            assert ours[leaf].dtype == theirs[leaf].dtype
            assert torch.equal(ours[leaf], theirs[leaf])

    @EVERY_DTYPE
    @pytest.mark.parametrize("compress_statistics", [False, True])
    def test_what_it_stores_is_read_as_it_reads_it(
        self, functional: Any, compress_statistics: bool, dtype: torch.dtype
    ) -> None:
        packed, state = functional.quantize_4bit(
            weight(dtype=dtype), blocksize=64, compress_statistics=compress_statistics, quant_type="nf4"
        )
        stored = {f"weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(decode_nf4(stored | {"weight": packed}).dequantize(dtype), theirs)

    def test_its_nested_scales_are_ours_but_for_those_halfway_between_two_levels(self, functional: Any) -> None:
        scale = block_maximum(weight(300, 1024))
        codes, state = functional.quantize_blockwise((scale - scale.mean()).flatten(), blocksize=256)
        ours = nest(scale)
        assert torch.equal(ours.largest, state.absmax)
        theirs = NestedScales(codes.view(scale.shape), ours.largest, ours.mean)
        far, near = ((nested.dequantize() - scale).abs() for nested in (theirs, ours))
        assert (near <= far + 1e-8).all()
        assert (far - near).max() < 1e-4 * ours.largest.max()
