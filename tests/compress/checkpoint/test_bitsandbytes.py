from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.checkpoint.bitsandbytes import INT8, STATE, decode_int8, decode_nf4, encode_int8, encode_nf4, pack_nibbles
from compress.core import normal_float
from compress.core.affine import quantize
from compress.core.normal_float import NestedScales, block_maximum, nearest_codes, nest
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.quantize.rtn import rtn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def weight(rows: int = 96, columns: int = 320, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).to(dtype)


def nf4(w: Tensor, nested: bool) -> tuple[Tensor, Tensor | NestedScales]:
    scale = block_maximum(w)
    return nearest_codes(w, scale), nest(scale) if nested else scale


def int8(dtype: torch.dtype) -> QuantizedTensor:
    return rtn(weight(), Grid(8), scale_dtype=dtype)


def test_the_first_of_two_codes_is_the_high_nibble() -> None:
    codes = torch.tensor([[0, 1, 15, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x01], [0xF8]]


@NESTED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_decoded_is_what_was_encoded(nested: bool, dtype: torch.dtype) -> None:
    codes, scale = nf4(weight(), nested)
    codes_again, scale_again, dtype_again = decode_nf4(encode_nf4(codes, scale, dtype))
    assert torch.equal(codes_again, codes)
    assert dtype_again == dtype
    if isinstance(scale, NestedScales):
        assert torch.equal(scale_again.codes, scale.codes)
        assert torch.equal(scale_again.largest, scale.largest)
        assert scale_again.mean == scale.mean
    else:
        assert torch.equal(scale_again, scale)


def test_the_length_of_the_state_is_known_before_the_weights_are() -> None:
    lengths = {len(encode_nf4(*nf4(weight() * unit, True), torch.float32)[STATE]) for unit in (1, 3.7e-8, 2**9, 0)}
    assert len(lengths) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_rows_come_back_exactly(dtype: torch.dtype) -> None:
    tensor = int8(dtype)
    assert (tensor.scale < 0).any()
    assert decode_int8(encode_int8(tensor), dtype) == tensor


@pytest.mark.parametrize("grid", [Grid(8, False), Grid(8, True, 64), Grid(4)], ids=str)
def test_other_grids_than_int8_rows_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="cannot be stored as int8 rows; use w8a8, symmetric, group_size: null"):
        encode_int8(rtn(weight(), grid, scale_dtype=torch.float32))


def test_tiled_rows_are_refused() -> None:
    stored = encode_int8(int8(torch.bfloat16)) | {"weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="weight_format 1 cannot be read, only 0"):
        decode_int8(stored, torch.bfloat16)


def test_blocks_across_rows_and_other_levels_are_refused() -> None:
    stored = encode_nf4(*nf4(weight(), False), torch.float32)
    with pytest.raises(ValueError, match="are not the levels of NF4"):
        decode_nf4(stored | {"weight.quant_map": torch.linspace(-1, 1, 16)})
    state = json.loads(bytes(stored[STATE].tolist())) | {"shape": [320, 96]}
    with pytest.raises(ValueError, match="rows of 96 columns are not made of whole blocks of 64"):
        decode_nf4(stored | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] is an odd number of codes"):
        pack_nibbles(torch.zeros(1, 3, dtype=torch.uint8))


class TestBesideBitsandbytes:
    """What the package itself computes, where it is installed."""

    @pytest.fixture
    def functional(self) -> Any:
        return pytest.importorskip("bitsandbytes.functional")

    @NESTED
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nf4_is_stored_to_the_byte_as_it_stores_it(self, functional: Any, nested: bool, dtype: torch.dtype) -> None:
        w = weight(dtype=dtype)
        packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
        theirs = {"weight": packed} | {f"weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
        ours = encode_nf4(*nf4(w, nested), dtype)
        assert set(ours) == set(theirs)
        for leaf in set(ours) - {STATE}:
            assert ours[leaf].dtype == theirs[leaf].dtype
            if not (nested and leaf == "weight.absmax"):  # the codes of scales have a test of their own, below
                assert torch.equal(ours[leaf], theirs[leaf])
        assert bytes(ours[STATE].tolist()).rstrip() == bytes(theirs[STATE].tolist())

    @NESTED
    def test_it_makes_the_same_weights_of_nf4(self, functional: Any, nested: bool) -> None:
        codes, scale = nf4(weight(), nested)
        stored = encode_nf4(codes, scale, torch.float32)
        leaves = {leaf.removeprefix("weight."): tensor for leaf, tensor in stored.items() if leaf != "weight"}
        state = functional.QuantState.from_dict(leaves, torch.device("cpu"))
        used = scale.dequantize() if isinstance(scale, NestedScales) else scale
        theirs = functional.dequantize_4bit(stored["weight"], state)
        assert torch.equal(theirs, normal_float.dequantize(codes, used))

    def test_it_makes_the_same_weights_of_int8_rows(self, functional: Any) -> None:
        tensor = int8(torch.bfloat16)
        stored = encode_int8(tensor)
        theirs = functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
        assert torch.allclose(theirs, tensor.dequantize(), rtol=1e-6, atol=0)

    def test_its_int8_rows_are_round_to_nearest_on_127_levels_but_for_ties(self, functional: Any) -> None:
        w = weight().half()
        codes, absmax, _ = functional.int8_vectorwise_quant(w)
        ours = encode_int8(quantize(w, (absmax / 127).unsqueeze(1), None, Grid(8)))
        steps = w.float() * 127 / absmax.unsqueeze(1)
        tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
        assert torch.equal(ours["weight"][~tie], codes[~tie])
        assert torch.allclose(ours["SCB"], absmax, rtol=1e-6, atol=0)

    def test_its_nested_scales_are_ours_but_for_those_halfway_between_two_levels(self, functional: Any) -> None:
        scale = block_maximum(weight(300, 1024))
        codes, state = functional.quantize_blockwise((scale - scale.mean()).flatten(), blocksize=256)
        ours = nest(scale)
        assert torch.equal(ours.largest, state.absmax)
        theirs = NestedScales(codes.view(scale.shape), ours.largest, ours.mean)
        far, near = ((nested.dequantize() - scale).abs() for nested in (theirs, ours))
        assert (near <= far + 1e-8).all()
        assert (far - near).max() < 1e-4 * ours.largest.max()

    @pytest.mark.parametrize("kind", ["plain", "nested", "int8"])
    def test_transformers_loads_a_folder_and_computes_with_our_weights(
        self, functional: Any, kind: str, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        stored: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            layer = name.removesuffix(".weight")
            if "_proj" not in layer:
                stored[name] = tensor.clone()
                continue
            if kind == "int8":
                quantized = rtn(tensor, INT8, scale_dtype=torch.bfloat16)
                leaves, dense[name] = encode_int8(quantized), quantized.dequantize()
            else:
                codes, scale = nf4(tensor, kind == "nested")
                used = scale.dequantize() if isinstance(scale, NestedScales) else scale
                leaves, dense[name] = encode_nf4(codes, scale, torch.float32), normal_float.dequantize(codes, used)
            stored |= {f"{layer}.{leaf}": leaf_tensor for leaf, leaf_tensor in leaves.items()}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": kind != "int8",
            "load_in_8bit": kind == "int8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": kind == "nested",
            "bnb_4bit_compute_dtype": "float32",
            "llm_int8_skip_modules": ["lm_head"],
        }
        described = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(described | {"dtype": "float32"}))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.load_state_dict(model.state_dict() | dense)
        tokens = torch.arange(40).view(2, 20)
        with torch.no_grad():
            ours, theirs = model(tokens).logits, loaded(tokens).logits
        # int8 layers round their inputs as well, to 8 bits per token.
        assert (theirs - ours).norm() < (0.05 if kind == "int8" else 0.02) * ours.norm()
        assert type(loaded.model.layers[0].mlp.up_proj).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
