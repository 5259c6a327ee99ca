"""Other people's ways to compute a linear layer, for `bench_kernels.py`: torch's own, and packages where installed.

Each is called as its project's documentation has it, with the defaults it comes with. Packages are imported when they
are used; some want a GPU for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import GROUP_SIZE, Kernel, Layer, bf16_activations, int8_activations, random_bytes
from torch import Tensor, nn


def _dense(layer: Layer, device: str) -> Tensor:
    return (torch.randn(layer.outputs, layer.inputs, device=device) * 0.02).to(torch.bfloat16)


def _linear(layer: Layer, device: str) -> nn.Linear:
    linear = nn.Linear(layer.inputs, layer.outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(_dense(layer, device), requires_grad=False)
    return linear


def _int8(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    return random_bytes((layer.outputs, layer.inputs), torch.int8, device), torch.full(
        (layer.outputs, 1), 1e-4, device=device
    )


def _group_scales(layer: Layer, device: str) -> Tensor:
    return torch.full((layer.outputs, layer.inputs // GROUP_SIZE), 0.005, dtype=torch.bfloat16, device=device)


def _tinygemm(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    """Packed with 8 inner tiles; scales and zeros next to each other."""
    packed = random_bytes((layer.outputs // 8, layer.inputs // 128, 32, 4), torch.int32, device)
    return packed, torch.stack([_group_scales(layer, device).T] * 2, dim=2).contiguous()


def _fp8(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    return _dense(layer, device).to(torch.float8_e4m3fn), torch.ones(1, layer.outputs, device=device)


def _fp8_activations(tokens: int, inputs: int, device: str) -> Sequence[Tensor]:
    codes = torch.randn(tokens, inputs, device=device).to(torch.float8_e4m3fn)
    return codes, torch.ones(tokens, 1, device=device)


def _scaled_mm(weights: Any, x: Sequence[Tensor]) -> Tensor:
    weight, scale = weights
    return torch._scaled_mm(x[0], weight.t(), x[1], scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def _gemlite_int4(layer: Layer, device: str) -> nn.Module:
    from gemlite.helper import A16W4_HQQ_INT

    codes = torch.randint(0, 16, layer, dtype=torch.uint8, device=device)
    scales = _group_scales(layer, device)
    return A16W4_HQQ_INT(device=device, dtype=torch.bfloat16).from_weights(codes, scales, torch.full_like(scales, 8))


def _gemlite_a8w4(layer: Layer, device: str) -> nn.Module:
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    codes = torch.randint(0, 16, layer, dtype=torch.uint8, device=device)
    scales = _group_scales(layer, device)
    make = A8W4_HQQ_INT_dynamic(device=device, dtype=torch.bfloat16)
    return make.from_weights(codes, scales, torch.full_like(scales, 8))


def _gemlite_int8(layer: Layer, device: str) -> nn.Module:
    from gemlite.helper import A16W8_INT8

    codes, scales = _int8(layer, device)
    return A16W8_INT8(device=device, dtype=torch.bfloat16).from_weights(codes, scales=scales)


def _gemlite_a8w8(layer: Layer, device: str) -> nn.Module:
    from gemlite.helper import A8W8_int8_dynamic

    codes, scales = _int8(layer, device)
    return A8W8_int8_dynamic(device=device, dtype=torch.bfloat16).from_weights(codes, scales=scales)


def _conch_int4(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    packed = random_bytes((layer.inputs // 8, layer.outputs), torch.int32, device)
    return packed, _group_scales(layer, device).T.contiguous()


def _conch_mixed(weights: Any, x: Sequence[Tensor]) -> Tensor:
    from conch.ops.quantization.gemm import mixed_precision_gemm

    packed, scales = weights
    return mixed_precision_gemm(x[0], packed, scales, None, 4, 8, GROUP_SIZE)


def _conch_int8(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    codes, scales = _int8(layer, device)
    return codes.t().contiguous(), scales


def _conch_scaled(weights: Any, x: Sequence[Tensor]) -> Tensor:
    from conch.ops.quantization.gemm import scaled_gemm

    return scaled_gemm(x[0], weights[0], x[1][:, None], weights[1], torch.bfloat16)


def _torchao(config: str, **options: Any) -> Any:
    """Makes layers that `config` of torchao's has quantized."""

    def make(layer: Layer, device: str) -> nn.Module:
        import torchao.quantization as ao

        parent = nn.Sequential(_linear(layer, device))
        ao.quantize_(parent, getattr(ao, config)(**options, set_inductor_config=False))
        return parent

    return make


def _bitsandbytes_nf4(layer: Layer, device: str) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.inputs, layer.outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(_dense(layer, "cpu"), requires_grad=False, quant_type="nf4")
    return made.to(device)


def _bitsandbytes_int8(layer: Layer, device: str) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(layer.inputs, layer.outputs, bias=False, has_fp16_weights=False)
    made.weight = bitsandbytes.nn.Int8Params(_dense(layer, "cpu"), requires_grad=False, has_fp16_weights=False)
    return made.to(device)


def _module(module: Any, x: Sequence[Tensor]) -> Tensor:
    return module(x[0])


QUANTIZES = "quantizes activations too"
MADE = (
    Kernel("cuBLAS bf16", "bf16", _dense, bf16_activations, lambda weight, x: F.linear(x[0], weight)),
    Kernel(
        "tinygemm int4", "w4a16", _tinygemm, bf16_activations,
        lambda weights, x: torch._weight_int4pack_mm(x[0], weights[0], GROUP_SIZE, weights[1]),
    ),
    Kernel(
        "torch _int_mm", "w8a8", _int8, int8_activations,
        lambda weights, x: torch._int_mm(x[0], weights[0].t()), "int32 results, no scales", least_tokens=17,
    ),
    Kernel("torch _scaled_mm fp8", "w8a8", _fp8, _fp8_activations, _scaled_mm, "activations come quantized"),
    Kernel("gemlite A16W4", "w4a16", _gemlite_int4, bf16_activations, _module),
    Kernel("gemlite A16W8", "w8a16", _gemlite_int8, bf16_activations, _module),
    Kernel("gemlite A8W8", "w8a8", _gemlite_a8w8, bf16_activations, _module, QUANTIZES),
    Kernel(
        "gemlite A8W4", "w4a8", _gemlite_a8w4, bf16_activations, _module,
        f"fp8 activations, groups of {GROUP_SIZE}, {QUANTIZES}",
    ),
    Kernel("conch int4", "w4a16", _conch_int4, bf16_activations, _conch_mixed),
    Kernel("conch int8", "w8a8", _conch_int8, int8_activations, _conch_scaled, "activations come quantized"),
    Kernel(
        "torchao int4", "w4a16",
        _torchao("Int4WeightOnlyConfig", group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"),
        bf16_activations, _module,
    ),
    Kernel("torchao int8", "w8a16", _torchao("Int8WeightOnlyConfig"), bf16_activations, _module),
    Kernel(
        "torchao A8W8", "w8a8", _torchao("Int8DynamicActivationInt8WeightConfig"), bf16_activations, _module, QUANTIZES,
    ),
    Kernel("bitsandbytes nf4", "w4a16", _bitsandbytes_nf4, bf16_activations, _module, "groups of 64"),
    Kernel("bitsandbytes int8", "w8a16", _bitsandbytes_int8, bf16_activations, _module, QUANTIZES),
)  # fmt: skip
RIVALS = {kernel.name: kernel for kernel in MADE}
