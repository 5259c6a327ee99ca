from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.checkpoint import CompressedTensors, Dense, Format
from compress.core.floats import quantize_float
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import FLOAT_SCHEMES, WEIGHT_BITS, Grid, Scheme, parse_scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
COMPRESSIONS = ("pack-quantized", "int-quantized")
GRIDS = [Grid(bits, symmetric, size) for bits in WEIGHT_BITS for symmetric in (True, False) for size in (32, None)]
INT4 = Grid(4, group_size=32)


def random_tensor(
    grid: Grid, shape: tuple[int, int] = (37, 96), dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """Every code and zero point of the grid, and scales of both signs."""
    generator = torch.Generator().manual_seed(grid.bits)
    size = (shape[0], grid.num_groups(shape[1]))

    def integers(shape: tuple[int, int]) -> Tensor:
        return torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8, generator=generator)

    scale = torch.randn(size, generator=generator).to(dtype)
    return QuantizedTensor(integers(shape), scale, None if grid.symmetric else integers(size), grid)


def quantize(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedTensor:
    """Round to nearest; symmetric scales take the sign of the extreme weight, so that half are negative."""
    grouped = weight.float().view(weight.shape[0], grid.num_groups(weight.shape[1]), -1)
    lo, hi = grouped.aminmax(dim=-1)
    if grid.symmetric:
        scale, zero_point = torch.where(-lo > hi, lo, hi) / grid.qmin, None
    else:
        scale = (hi - lo) / (grid.qmax - grid.qmin)
        zero_point = (grid.qmin - lo / scale).round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    scale = scale.to(dtype)
    shift = 0 if zero_point is None else zero_point.unsqueeze(-1)
    codes = (grouped / scale.float().unsqueeze(-1)).round() + shift
    return QuantizedTensor(codes.clamp(grid.qmin, grid.qmax).to(torch.int8).view(weight.shape), scale, zero_point, grid)


def headers(*entries: tuple[str, str]) -> dict[str, TensorHeader]:
    return {name: TensorHeader(name, dtype, (1,), Path("x.safetensors"), 0) for name, dtype in entries}


def config_of(weights: Mapping[str, Any], targets: Sequence[str] = ("Linear",), **rest: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": list(targets), "weights": dict(weights), **rest}}}


W4 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
}
PACKED = headers(("model.a.weight_packed", "I32"), ("model.a.weight_scale", "BF16"), ("norm.weight", "BF16"))


class TestTensors:
    def test_zero_points_are_packed_down_the_columns(self) -> None:
        grid = Grid(4, symmetric=False)
        zero_point = torch.tensor([[-8], [-7], [0], [7], [1], [2], [3], [4], [5]], dtype=torch.int8)
        tensor = QuantizedTensor(torch.zeros(9, 8, dtype=torch.int8), torch.ones(9, 1), zero_point, grid)
        words = CompressedTensors().encode("layer", tensor)["layer.weight_zero_point"]
        assert [int(word) & 0xFFFFFFFF for word in words[:, 0]] == [0xCBA9F810, 0x0000000D]

    def test_codes_are_packed_along_the_row_with_the_lowest_code_as_zero(self) -> None:
        codes = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
        tensor = QuantizedTensor(codes, torch.ones(1, 1), None, Grid(4))
        words = CompressedTensors().encode("layer", tensor)["layer.weight_packed"]
        assert [int(word) & 0xFFFFFFFF for word in words[0]] == [0x76543210, 0xFEDCBA98]

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_decode_inverts_encode(self, grid: Grid, compression: Any) -> None:
        tensor = random_tensor(grid)
        read = CompressedTensors().decode("a.b", CompressedTensors(compression).encode("a.b", tensor), grid)
        assert read.grid == grid
        assert torch.equal(read.codes, tensor.codes)
        assert torch.equal(read.scale, tensor.scale)
        assert grid.symmetric or torch.equal(read.zero_point, tensor.zero_point)

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_layout_promises_what_encode_writes(self, grid: Grid, compression: Any) -> None:
        form = CompressedTensors(compression)
        written = form.encode("a.b", random_tensor(grid))
        found = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()}
        assert form.layout("a.b", (37, 96), Scheme(grid), "BF16") == found

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    def test_encode_writes_tensors_that_safetensors_takes(self, compression: Any) -> None:
        tensor = random_tensor(Grid(4, symmetric=False, group_size=32), (64, 96))
        written = CompressedTensors(compression).encode("layer", tensor)
        assert all(stored.is_contiguous() for stored in written.values())

    def test_a_code_off_the_grid_is_not_packed(self) -> None:
        tensor = QuantizedTensor(torch.tensor([[-9]], dtype=torch.int8), torch.ones(1, 1), None, Grid(4))
        with pytest.raises(ValueError, match="does not fit in 4 bits"):
            CompressedTensors().encode("layer", tensor)

    def test_a_missing_tensor_is_named(self) -> None:
        written = CompressedTensors().encode("layer", random_tensor(INT4))
        del written["layer.weight_scale"]
        with pytest.raises(ModelError, match=r"layer\.weight_scale: is missing, expected \[37, 3\]"):
            CompressedTensors().decode("layer", written, INT4)

    def test_a_layer_that_is_not_there_is_named(self) -> None:
        with pytest.raises(ModelError, match=r"layer\.weight: is missing"):
            CompressedTensors().decode("layer", {}, INT4)

    def test_words_of_another_width_are_refused_with_both_shapes(self) -> None:
        written = CompressedTensors().encode("layer", random_tensor(INT4))
        with pytest.raises(ModelError, match=r"weight_packed: is \[37, 12\].*expected \[37, 9\]"):
            CompressedTensors().decode("layer", written, Grid(3, group_size=32))

    def test_scales_of_another_type_are_refused_with_both_types(self) -> None:
        written = CompressedTensors().encode("layer", random_tensor(INT4))
        written["layer.weight_scale"] = torch.ones(37, 3, dtype=torch.uint8)
        with pytest.raises(ModelError, match=r"weight_scale: is \[37, 3\] of torch\.uint8, expected .*bfloat16"):
            CompressedTensors().decode("layer", written, INT4)

    @pytest.mark.parametrize("shape", [[37], [37, 0], [37.0, 96.0], [37, 96, 1]])
    def test_a_stored_shape_that_is_none_is_refused(self, shape: Any) -> None:
        written = CompressedTensors().encode("layer", random_tensor(INT4))
        written["layer.weight_shape"] = torch.tensor(shape)
        with pytest.raises(ModelError, match=r"layer\.weight_shape: says"):
            CompressedTensors().decode("layer", written, INT4)

    def test_groups_that_do_not_divide_the_row_are_refused(self) -> None:
        written = CompressedTensors().encode("layer", random_tensor(INT4))
        with pytest.raises(ModelError, match="layer: in_features=96 is not a multiple of group_size=64"):
            CompressedTensors().decode("layer", written, Grid(4, group_size=64))

    def test_a_zero_point_on_a_symmetric_grid_is_refused(self) -> None:
        written = CompressedTensors().encode("layer", random_tensor(Grid(4, False, 32)))
        with pytest.raises(ModelError, match=r"weight_zero_point: has no meaning for .*symmetric=True"):
            CompressedTensors().decode("layer", written, INT4)

    def test_bytes_off_the_grid_are_refused(self) -> None:
        written = CompressedTensors("int-quantized").encode("layer", random_tensor(Grid(8, group_size=32)))
        with pytest.raises(ModelError, match=r"layer\.weight: holds -128 … 127, expected -8 … 7"):
            CompressedTensors().decode("layer", written, INT4)


SCHEMES = [parse_scheme(name) for name in ("w8a8", "w8a8-static", "w4a8", "w4a4", "w3a8", "w4a8-fp8", *FLOAT_SCHEMES)]


def stored_with_inputs(scheme: Scheme) -> tuple[QuantizedTensor, Tensor | None, dict[str, Tensor]]:
    """A weight [256, 128], the scale of its inputs if it has one, and what is stored of both."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    if scheme.weights.kind == "float":
        tensor = quantize_float(weight, scheme.weights, torch.bfloat16)
    else:
        tensor = random_tensor(scheme.weights, (256, 128))
    scale_dtype = torch.float32 if scheme.local else torch.bfloat16
    scale = torch.tensor([0.5], dtype=scale_dtype) if scheme.static else None
    return tensor, scale, CompressedTensors().encode("a.b", tensor, scheme.inputs, scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
class TestSchemes:
    def test_weights_and_scales_of_inputs_are_read_back(self, scheme: Scheme) -> None:
        tensor, scale, written = stored_with_inputs(scheme)
        assert CompressedTensors().decode("a.b", written, scheme.weights) == tensor
        assert CompressedTensors().input_scale("a.b", written, scheme) is scale

    def test_layout_promises_what_encode_writes(self, scheme: Scheme) -> None:
        _, _, written = stored_with_inputs(scheme)
        found = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()}
        assert CompressedTensors().layout("a.b", (256, 128), scheme, "BF16") == found

    def test_a_scheme_survives_the_config(self, scheme: Scheme) -> None:
        config = json.loads(json.dumps(CompressedTensors().quantization_config({"model.a": scheme}, [])))
        assert CompressedTensors().schemes(config, PACKED)["model.a"] == scheme

    def test_the_official_package_accepts_it(self, scheme: Scheme) -> None:
        official = pytest.importorskip("compressed_tensors.quantization")
        config = CompressedTensors().quantization_config({"a": scheme}, ["lm_head"])
        group = official.QuantizationConfig.model_validate(config).config_groups["group_0"]
        assert (group.input_activations is None) == (scheme.inputs is None)


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static", "nvfp4"])
def test_a_missing_scale_of_inputs_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"a\.b\.input_.*scale: is missing"):
        CompressedTensors().input_scale("a.b", {}, parse_scheme(name))


class TestConfig:
    def test_layers_on_one_grid_are_targeted_by_class(self) -> None:
        config = CompressedTensors().quantization_config(dict.fromkeys("ab", Scheme(INT4)), ["lm_head"])
        (group,) = config["config_groups"].values()
        assert group["targets"] == ["Linear"]
        assert config["ignore"] == ["lm_head"]

    def test_layers_on_several_grids_are_targeted_by_name(self) -> None:
        grids = {"a": Scheme(INT4), "b": Scheme(Grid(8)), "c": Scheme(INT4)}
        groups = CompressedTensors().quantization_config(grids, [])["config_groups"].values()
        assert [group["targets"] for group in groups] == [["a", "c"], ["b"]]

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_a_grid_survives_the_config(self, grid: Grid) -> None:
        config = json.loads(json.dumps(CompressedTensors().quantization_config({"model.a": Scheme(grid)}, [])))
        assert CompressedTensors().schemes(config, PACKED)["model.a"] == Scheme(grid)

    def test_mixed_grids_survive_the_config(self) -> None:
        grids = {"a": Scheme(INT4), "b": Scheme(Grid(8)), "c": Scheme(Grid(3, False, 16))}
        config = json.loads(json.dumps(CompressedTensors().quantization_config(grids, ["d"])))
        stored = headers(*((f"{name}.weight_packed", "I32") for name in grids), ("d.weight", "BF16"))
        assert CompressedTensors().schemes(config, stored) == grids

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_the_official_package_accepts_it(self, grid: Grid, compression: Any) -> None:
        official = pytest.importorskip("compressed_tensors.quantization")
        config = CompressedTensors(compression).quantization_config({"a": Scheme(grid)}, ["lm_head"])
        scheme = official.QuantizationConfig.model_validate(config).config_groups["group_0"]
        assert (scheme.weights.num_bits, scheme.weights.symmetric) == (grid.bits, grid.symmetric)

    def test_transformers_is_never_asked_to_dequantize_several_grids(self) -> None:
        grids = {"a": Scheme(Grid(4, False, 32)), "b": Scheme(Grid(8, False, 32))}
        assert "dequantize" not in CompressedTensors().quantization_config(grids, [])

    def test_only_layers_that_are_stored_quantized_are(self) -> None:
        stored = PACKED | headers(("model.b.weight", "I8"), ("model.c.weight", "BF16"))
        assert list(CompressedTensors().schemes(config_of(W4), stored)) == ["model.a", "model.b"]

    def test_a_name_comes_before_a_pattern_and_a_pattern_before_a_class(self) -> None:
        config = {
            "config_groups": {
                "class": {"targets": ["Linear"], "weights": W4 | {"num_bits": 2}},
                "pattern": {"targets": [r"re:.*\.[bc]$"], "weights": W4 | {"num_bits": 3}},
                "name": {"targets": ["x.c"], "weights": W4},
            }
        }
        stored = headers(*((f"x.{layer}.weight_packed", "I32") for layer in "abc"))
        found = CompressedTensors().schemes(config, stored)
        assert {name: scheme.weights.bits for name, scheme in found.items()} == {"x.a": 2, "x.b": 3, "x.c": 4}

    def test_patterns_match_from_the_start_of_the_name(self) -> None:
        with pytest.raises(ModelError, match=r"model\.a: is stored quantized, but no config group targets it"):
            CompressedTensors().schemes(config_of(W4, ["re:a"]), PACKED)

    @pytest.mark.parametrize(
        ("preset", "grid"),
        [("W4A16", Grid(4, True, 128)), ("w8a16", Grid(8, True, 128)), ("W4A16_ASYM", Grid(4, False, 128))],
    )
    def test_presets_are_understood(self, preset: str, grid: Grid) -> None:
        config = {"config_groups": {preset: ["Linear"]}}
        assert CompressedTensors().schemes(config, PACKED) == {"model.a": Scheme(grid)}

    @pytest.mark.parametrize(
        ("given", "grid"),
        [
            ({"num_bits": 4, "group_size": 32}, INT4),
            ({"num_bits": 4, "group_size": -1}, Grid(4)),
            ({"num_bits": 4, "group_size": 32, "actorder": "weight", "observer": "mse"}, INT4),
        ],
    )
    def test_what_is_left_out_is_inferred(self, given: dict[str, Any], grid: Grid) -> None:
        assert CompressedTensors().schemes(config_of(given), PACKED) == {"model.a": Scheme(grid)}

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (config_of(W4 | {"type": "fp4"}, format="nvfp4-pack-quantized"), "type: 'fp4'.*nvfp4"),
            (config_of(W4 | {"num_bits": 16}), "num_bits: 16"),
            (config_of(W4 | {"strategy": "block"}), "strategy: 'block'"),
            (config_of({"num_bits": 8}), "strategy: 'tensor'"),
            (config_of(W4 | {"group_size": None}), "group_size: got None"),
            (config_of(W4 | {"dynamic": True}), "dynamic: True"),
            (config_of(W4 | {"actorder": "group"}), "actorder: 'group'"),
            (config_of(W4, input_activations={"num_bits": 6}), r"input_activations\.num_bits: 6"),
            (
                config_of(W4, input_activations={"num_bits": 8, "strategy": "token"}),
                r"input_activations\.dynamic: False",
            ),
            (config_of(W4, output_activations={"num_bits": 8}), "output_activations: quantized outputs"),
            (config_of({}) | {"config_groups": {"FP6": ["Linear"]}}, "FP6: is no preset"),
            ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}}, "weights: got None"),
            ({"config_groups": {"group_0": {"targets": "Linear", "weights": W4}}}, "targets are 'Linear'"),
            ({}, "config_groups: got None"),
            (config_of(W4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            CompressedTensors().schemes(config, PACKED)

    def test_reordered_columns_are_refused(self) -> None:
        stored = PACKED | headers(("model.a.weight_g_idx", "I32"))
        with pytest.raises(ModelError, match=r"model\.a\.weight_g_idx"):
            CompressedTensors().schemes(config_of(W4), stored)

    def test_a_layer_that_is_no_linear_is_a_problem_with_a_fix(self) -> None:
        (problem,) = CompressedTensors().problems("h.0.attn.c_attn", "Conv1D", (192, 64), Scheme(INT4))
        assert "h.0.attn.c_attn is a Conv1D" in problem
        assert "format: dense" in problem

    def test_packed_zero_points_beside_rounded_inputs_are_refused(self) -> None:
        scheme = parse_scheme("w4a8", symmetric=False)
        (problem,) = CompressedTensors().problems("a", "Linear", (64, 128), scheme)
        assert "no longer rounds inputs" in problem
        assert CompressedTensors("int-quantized").problems("a", "Linear", (64, 128), scheme) == []

    def test_a_linear_layer_is_no_problem(self) -> None:
        assert CompressedTensors().problems("a", "Linear", (64, 64), Scheme(INT4)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_official_package_decompresses_to_our_weights(grid: Grid, compression: Any, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    form, tensor = CompressedTensors(compression), random_tensor(grid, dtype=dtype)
    config = QuantizationConfig.model_validate(form.quantization_config({"a": Scheme(grid)}, []))
    stored = {name.removeprefix("a."): value for name, value in form.encode("a", tensor).items()}
    official = BaseCompressor.get_value_from_registry(compression)
    weight = official.decompress(stored, config.config_groups["group_0"])["weight"]
    assert torch.equal(weight, tensor.dequantize(dtype))


class TestTransformers:
    """A folder in this format and a folder of the same dequantized weights are the same model."""

    SETTINGS = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip

    def logits(
        self, folder: Path, form: Format, grids: Sequence[Grid], stored: torch.dtype, loaded: torch.dtype
    ) -> Tensor:
        """Write a small model whose layers take the grids in turn, load it with no arguments, and run it."""
        torch.manual_seed(0)
        model = LlamaForCausalLM(self.SETTINGS).to(stored)
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        layers = [name.removesuffix(".weight") for name in tensors if "_proj." in name]
        assigned = {name: grids[index % len(grids)] for index, name in enumerate(layers)}
        for name, grid in assigned.items():
            tensors |= form.encode(name, quantize(tensors.pop(f"{name}.weight"), grid, stored))
        settings = self.SETTINGS.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(stored)[6:]}
        if quantization := form.quantization_config(
            {name: Scheme(grid) for name, grid in assigned.items()}, ["lm_head"]
        ):
            settings["quantization_config"] = quantization
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=loaded)(torch.arange(24).view(2, 12)).logits

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_packed_weights(self, bits: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path) -> None:
        self.check(tmp_path, CompressedTensors(), [Grid(bits, symmetric, 32)], dtype, dtype)

    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    def test_one_scale_per_channel(self, symmetric: bool, tmp_path: Path) -> None:
        self.check(tmp_path, CompressedTensors(), [Grid(4, symmetric)], torch.float32, torch.float32)

    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_bytes(self, bits: int, symmetric: bool, tmp_path: Path) -> None:
        form = CompressedTensors("int-quantized")
        self.check(tmp_path, form, [Grid(bits, symmetric, 32)], torch.float32, torch.float32)

    def test_several_symmetric_grids(self, tmp_path: Path) -> None:
        grids = [Grid(4, group_size=32), Grid(8), Grid(3, group_size=16)]
        self.check(tmp_path, CompressedTensors(), grids, torch.float32, torch.float32)

    def check(
        self, folder: Path, form: Format, grids: Sequence[Grid], stored: torch.dtype, loaded: torch.dtype
    ) -> None:
        pytest.importorskip("compressed_tensors")
        plain = self.logits(folder / "plain", Dense(), grids, stored, loaded)
        assert torch.equal(self.logits(folder / "packed", form, grids, stored, loaded), plain)

    def test_the_small_models_scales_have_both_signs(self) -> None:
        torch.manual_seed(0)
        weight = LlamaForCausalLM(self.SETTINGS).state_dict()["model.layers.0.self_attn.q_proj.weight"]
        signs = quantize(weight, INT4, torch.float32).scale.sign()
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
