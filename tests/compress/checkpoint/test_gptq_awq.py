"""GPTQ's and AWQ's layouts: golden words, round trips of every width, an independent decoder, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.checkpoint import FORMATS, AWQFormat, Format, GPTQFormat, format_of
from compress.core.affine import params_from_range, quantize
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader

CASES = [
    *((GPTQFormat(1), bits, True) for bits in (2, 3, 4, 8)),
    *((GPTQFormat(2), bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    (AWQFormat(), 4, True),
    (AWQFormat(), 4, False),
]


def weight(grid: Grid, rows: int = 64, columns: int = 96) -> QuantizedTensor:
    torch.manual_seed(0)
    dense = torch.randn(rows, columns)
    groups = dense.unflatten(1, (grid.num_groups(columns), -1))
    scale, zero_point = params_from_range(groups.amin(-1), groups.amax(-1), grid, torch.float16)
    return quantize(dense, scale, zero_point, grid)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a bit stream along the last dimension, one at a time, as the format's description says it."""
    streams = [sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row)) for row in words]
    return torch.tensor(
        [[stream >> (bits * place) & ((1 << bits) - 1) for place in range(count)] for stream in streams]
    )


def described(form: Format, name: str, stored: dict[str, Tensor], bits: int, rows: int, columns: int) -> Tensor:
    """The weight that a reader would compute, written from the formats' descriptions and nothing else."""
    scales = stored[f"{name}.scales"].float()
    if form.name == "awq":
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        codes = unpacked(stored[f"{name}.qweight"], 4, rows).view(columns, -1, 8)[..., order].reshape(columns, rows)
        zeros = unpacked(stored[f"{name}.qzeros"], 4, rows).view(len(scales), -1, 8)[..., order].reshape(-1, rows)
        group = torch.arange(columns) // (columns // len(scales))
    else:
        codes = unpacked(stored[f"{name}.qweight"].T, bits, columns).T
        zeros = unpacked(stored[f"{name}.qzeros"], bits, rows) + (form.name == "gptq")
        group = stored[f"{name}.g_idx"].long()
    return ((codes - zeros[group]) * scales[group]).T


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
class TestEveryWidth:
    def test_reads_back_what_was_written(
        self, form: Format, bits: int, symmetric: bool, group_size: int | None
    ) -> None:
        tensor = weight(Grid(bits, symmetric, group_size))
        stored = form.encode("layer", tensor)
        assert form.decode("layer", stored, tensor.grid) == tensor
        layout = form.layout("layer", tensor.shape, Scheme(tensor.grid), "F16")
        assert {key: tuple(value.shape) for key, value in stored.items()} == {
            k: shape for k, (_, shape) in layout.items()
        }
        headers: dict[str, Any] = {key: TensorHeader(key, *entry, None, 0) for key, entry in layout.items()}  # type: ignore[arg-type]
        assert form.shape("layer", headers, tensor.grid) == tensor.shape
        config = form.quantization_config({"layer": Scheme(tensor.grid)}, ["lm_head"])
        assert config
        assert format_of({"quantization_config": config}) == form
        assert form.schemes(config, headers) == {"layer": Scheme(tensor.grid)}

    def test_a_decoder_written_from_the_description_computes_the_same(
        self, form: Format, bits: int, symmetric: bool, group_size: int | None
    ) -> None:
        tensor = weight(Grid(bits, symmetric, group_size))
        decoded = described(form, "layer", form.encode("layer", tensor), bits, *tensor.shape)
        assert torch.equal(decoded, tensor.dequantize())


def test_words_are_those_of_the_golden_vectors() -> None:
    codes = (torch.arange(8) - 8).to(torch.int8)
    down = QuantizedTensor(codes.repeat(8, 1), torch.ones(8, 1, dtype=torch.float16), None, Grid(4))
    stored = GPTQFormat(1).encode("layer", down)
    assert set(stored["layer.qweight"].flatten().tolist()) == {0x76543210}
    assert stored["layer.qzeros"].flatten().tolist() == [0x77777777]
    assert GPTQFormat(2).encode("layer", down)["layer.qzeros"].item() & 0xFFFFFFFF == 0x88888888
    across = QuantizedTensor(codes.unsqueeze(1).repeat(1, 4), torch.ones(8, 1, dtype=torch.float16), None, Grid(4))
    assert set(AWQFormat().encode("layer", across)["layer.qweight"].flatten().tolist()) == {0x75316420}


def test_scales_that_are_no_half_numbers_are_refused() -> None:
    tensor = weight(Grid(4, True, 32))
    exact = QuantizedTensor(tensor.codes, tensor.scale.float() * (1 + 2**-14), None, tensor.grid)
    with pytest.raises(ValueError, match="are not float16 numbers"):
        AWQFormat().encode("layer", exact)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "scheme", "message"),
    [
        ("gptq", "Linear", (64, 96), Scheme(Grid(4, False, 32)), "cannot hold every zero point. Use gptq_v2"),
        ("gptq_v2", "Linear", (64, 100), Scheme(Grid(4, True, 20)), "do not fill whole 32-bit words"),
        ("gptq_v2", "Conv1D", (64, 96), Scheme(Grid(4, True, 32)), "holds nn.Linear only"),
        ("gptq_v2", "Linear", (64, 96), Scheme(Grid(5, True, 32)), "integer weights of 2, 3, 4, 8 bits"),
        ("awq", "Linear", (64, 96), Scheme(Grid(3, True, 32)), "integer weights of 4 bits"),
        ("awq", "Linear", (60, 96), Scheme(Grid(4, True, 32)), "no multiple of 8"),
        ("awq", "Linear", (64, 96), Scheme(Grid(4), Grid(8)), "whose inputs are not rounded"),
    ],
)
def test_what_cannot_be_held_is_refused(
    name: str, kind: str, shape: tuple[int, int], scheme: Scheme, message: str
) -> None:
    options: Any = None
    assert any(message in problem for problem in FORMATS[name](options).problems("layer", kind, shape, scheme))


@pytest.mark.parametrize("form", [GPTQFormat(1), GPTQFormat(2), AWQFormat()], ids=lambda form: form.name)
class TestDamagedFiles:
    def test_a_missing_tensor_is_named(self, form: Format) -> None:
        stored = form.encode("layer", weight(Grid(4, True, 32)))
        for leaf in ("qweight", "qzeros", "scales"):
            part = {key: value for key, value in stored.items() if key != f"layer.{leaf}"}
            with pytest.raises(ModelError, match=f"layer.{leaf}: is missing"):
                form.decode("layer", part, Grid(4, True, 32))

    def test_a_tensor_of_another_shape_is_named(self, form: Format) -> None:
        stored = form.encode("layer", weight(Grid(4, True, 32)))
        for leaf in ("qzeros", "scales"):
            with pytest.raises(ModelError, match=f"layer.{leaf}: is "):
                form.decode("layer", stored | {f"layer.{leaf}": stored[f"layer.{leaf}"][:1]}, Grid(4, True, 32))

    def test_zeros_that_contradict_the_config_are_refused(self, form: Format) -> None:
        stored = form.encode("layer", weight(Grid(4, True, 32)))
        with pytest.raises(ModelError, match="are not all 8"):
            form.decode("layer", stored | {"layer.qzeros": stored["layer.qzeros"] + 1}, Grid(4, True, 32))


def test_columns_in_another_order_are_refused() -> None:
    stored = GPTQFormat(2).encode("layer", weight(Grid(4, True, 32)))
    stored["layer.g_idx"] = stored["layer.g_idx"].flip(0)
    with pytest.raises(ModelError, match="desc_act"):
        GPTQFormat(2).decode("layer", stored, Grid(4, True, 32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, "quantization_config.bits: 5"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "gives layers other grids"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: 0"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in layout 'gemv'"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        format_of({"quantization_config": config}).schemes(config, {})
