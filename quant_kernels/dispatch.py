"""Which kernel runs which layer: a table, read from the top; the first kernel that has no objection takes it.

A kernel is a layout of the weight, and one or more routes through it, by the number of tokens: what is quickest for one
token is seldom so for a prompt. To add a kernel, write a file with its contract, objection, packing, launcher and row
dequantizer, and add its line to `KERNELS` above those it should be preferred to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from quant_kernels import cpu, gpu, gpu_fp4, gpu_rounded, native, reference
from quant_kernels.layout import Levels, LinearSpec, Packed, check, levels_of
from quant_kernels.reference import DequantizeRows

Objection = Callable[[LinearSpec], str | None]
"""Why a kernel cannot run a layer, as the rest of a sentence that starts with its name; None where it can."""
Pack = Callable[..., Packed]
"""(codes, scale, zero_point, bits) → the kernel's layout; one that takes FP4 has `global_scale` as a fifth argument."""
Linear = Callable[[Tensor, Packed, Tensor | None], Tensor]
"""(x [tokens, in], weight, bias) → [tokens, out]."""


@dataclass(frozen=True)
class Route:
    """How a kernel computes for up to so many tokens."""

    most_tokens: float
    summary: str
    linear: Linear
    is_open: Callable[[], bool] = lambda: True
    """Whether this machine has what it takes."""


@dataclass(frozen=True)
class Kernel:
    """One way to keep a quantized linear layer, and to compute it."""

    name: str
    devices: tuple[str, ...]
    """Types of device it runs on; empty: all."""
    dtypes: tuple[torch.dtype, ...]
    """Types of activations it takes; empty: all floats."""
    objection: Objection
    pack: Pack
    dequantize_rows: DequantizeRows
    routes: tuple[Route, ...]
    """For few tokens first; the last takes any number."""
    levels: tuple[Levels, ...] = ("int",)
    """Of the weights it takes."""
    inputs: Levels | None = None
    """What it rounds its inputs to; None: it takes them as they are."""

    @property
    def summary(self) -> str:
        """The routes that are open, in words."""
        words: list[str] = []
        limit = 0.0
        for route in self.routes:
            if not route.is_open() or route.most_tokens <= limit:
                continue
            if not words or not words[-1].endswith(route.summary):
                words.append(f"from {limit + 1:.0f} tokens on {route.summary}" if limit else route.summary)
            limit = route.most_tokens
        return "; ".join(words)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] → [tokens, out], by the first open route for so many tokens."""
        route = next(route for route in self.routes if len(x) <= route.most_tokens and route.is_open())
        return route.linear(x, packed, bias)


BF16 = (torch.bfloat16,)
HALF = (torch.float16, torch.bfloat16)

KERNELS: tuple[Kernel, ...] = (
    Kernel("gpu_w8a8", ("cuda",), HALF, gpu_rounded.w8a8_objection, gpu_rounded.pack_w8a8,
           gpu_rounded.dequantize_byte_rows, (
        Route(inf, "inputs to int8, then our Triton kernel on the integer units", gpu_rounded.linear_w8a8),
    ), inputs="int"),
    Kernel("gpu_w4a8", ("cuda",), HALF, gpu_rounded.w4a8_objection, gpu_rounded.pack_w4a8,
           gpu_rounded.dequantize_w4a8_rows, (
        Route(inf, "inputs to int8, then our Triton kernel on the integer units", gpu_rounded.linear_w4a8),
    ), inputs="int"),
    Kernel("gpu_fp8", ("cuda",), HALF, gpu_rounded.fp8_objection, gpu_rounded.pack_fp8,
           gpu_rounded.dequantize_byte_rows, (
        Route(inf, "inputs to FP8, then our Triton kernel on the FP8 units", gpu_rounded.linear_fp8),
    ), levels=("fp8",), inputs="fp8"),
    Kernel("gpu_fp8_weights", ("cuda",), HALF, gpu_rounded.fp8_weights_objection, gpu_rounded.pack_fp8_weights,
           gpu_rounded.dequantize_fp8_word_rows, (
        Route(inf, "our Triton kernel on FP8 weights", gpu_rounded.linear_fp8_weights),
    ), levels=("fp8",)),
    Kernel("gpu_fp4", ("cuda",), HALF, gpu_fp4.fp4_objection, gpu_fp4.pack_fp4, gpu_fp4.dequantize_fp4_rows, (
        Route(gpu.MOST_TOKENS, "our Triton kernel on words of 4-bit floats", gpu_fp4.linear_fp4),
        Route(inf, "dequantized once, then torch's matrix product", gpu_fp4.linear_fp4_dense),
    ), levels=("fp4",)),
    Kernel("gpu_int4", ("cuda",), HALF, gpu.int4_objection, gpu.pack_int4, gpu.dequantize_int4_rows, (
        Route(gpu.MOST_TOKENS, "our Triton kernel on words of 2, 3 or 4 bits", gpu.linear_int4),
        Route(inf, "dequantized once, then torch's matrix product", gpu.linear_int4_dense),
    )),
    Kernel("gpu_int8", ("cuda",), HALF, gpu.int8_objection, gpu.pack_int8, gpu.dequantize_int8_rows, (
        Route(inf, "our Triton kernel on 8-bit weights", gpu.linear_int8),
    )),
    Kernel("cpu_int4", ("cpu",), BF16, cpu.int4_objection, cpu.pack_int4, cpu.dequantize_int4_rows, (
        Route(1, "unpacked in C, two columns at a time", cpu.linear_int4_dot, native.has_dots),
        Route(cpu.INT4_MATRIX_UNIT_TOKENS, "torch's int4 matrix product", cpu.linear_int4),
        Route(inf, "unpacked in C for the matrix unit", cpu.linear_int4_matrix_unit, native.has_matrix_unit),
        Route(cpu.INT4_MOST_TOKENS, "torch's int4 matrix product", cpu.linear_int4),
        Route(inf, "unpacked by chunks, then torch's matrix product", cpu.linear_int4_by_chunks),
    )),
    Kernel("cpu_int8", ("cpu",), BF16, cpu.int8_objection, cpu.pack_int8, cpu.dequantize_int8_rows, (
        Route(cpu.INT8_MOST_TOKENS, "torch's int8 matrix product", cpu.linear_int8),
        Route(inf, "unpacked by chunks, then torch's matrix product", cpu.linear_int8_by_chunks),
    )),
    Kernel("reference", (), (), reference.objection, reference.pack, reference.dequantize_rows, (
        Route(inf, "dequantizes a chunk of rows at a time, then torch's matrix product", reference.linear_reference),
    ), levels=("int", "fp8", "fp4")),
)  # fmt: skip
_BY_NAME = {kernel.name: kernel for kernel in KERNELS}


@dataclass(frozen=True)
class Backend:
    """The kernel a layer would run on, and why that one."""

    name: str
    reason: str


def choose(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    device: str,
    in_features: int,
    out_features: int,
    levels: Levels = "int",
    inputs: Levels | None = None,
) -> Backend:
    """The kernel for a layer: `bits`, `group_size` and `levels` of its weight, `dtype` of its activations and what
    they are rounded to."""
    kind = torch.device(device).type
    spec = LinearSpec(bits, group_size, symmetric, dtype, kind, in_features, out_features, levels, inputs)
    objections: list[str] = []
    for kernel in KERNELS:
        if kernel.devices and spec.device not in kernel.devices:
            continue
        if spec.levels not in kernel.levels or kernel.inputs not in (None, spec.inputs):
            continue
        objection = kernel.objection(spec) or _dtype_objection(kernel, spec.dtype)
        if objection is None:
            return Backend(kernel.name, "; ".join([kernel.summary, *objections]))
        objections.append(f"{kernel.name} {objection}")
    raise AssertionError("the last kernel of the table takes every layer")


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype,
    device: str = "cpu",
    inputs: Levels | None = None,
    global_scale: Tensor | None = None,
) -> Packed:
    """A weight in the layout of the kernel chosen for it, on `device`.

    codes: int8 [out, in], signed; levels of a float format in float8_e4m3fn; or FP4, uint8 [out, in / 2], the even
    column in the low nibble. scale: float [out, groups]; FP4's is float8_e4m3fn in groups of 16, divided by
    `global_scale`, float32 [1] (NVFP4), or float8_e8m0fnu in groups of 32 (MXFP4). zero_point: int8 [out, groups] or
    None for a symmetric weight; dtype: of the activations to come; inputs: what these are to be rounded to, which a
    kernel may do itself (`rounds_inputs`). Raises ValueError where these are not a weight.
    """
    check(codes, scale, zero_point, bits, global_scale)
    levels = levels_of(codes)
    bits = 8 if levels == "fp8" else bits  # whatever floats they are, each takes a byte
    rows, columns = codes.shape[0], codes.shape[1] * (2 if levels == "fp4" else 1)
    group_size = columns // scale.shape[1]
    backend = choose(bits, group_size, zero_point is None, dtype, device, columns, rows, levels, inputs)
    moved = None if zero_point is None else zero_point.to(device)
    overall = () if global_scale is None else (global_scale.to(device),)
    return _BY_NAME[backend.name].pack(codes.to(device), scale.to(device), moved, bits, *overall)


def rounds_inputs(packed: Packed) -> bool:
    """Whether this weight's kernel rounds activations itself; all others take what the caller has rounded."""
    return _BY_NAME[packed.kernel].inputs is not None


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] → [..., out] in the type of x. Raises ValueError where x does not suit the weight."""
    kernel = _BY_NAME[packed.kernel]
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has shape {[*x.shape]}, but the layer has in_features={packed.in_features}")
    if x.device != packed.codes.device or (kernel.devices and x.device.type not in kernel.devices):
        raise ValueError(
            f"x is on {x.device}, the weight on {packed.codes.device} in the layout of {kernel.name}. "
            "Load the model again for that device"
        )
    if unsuited := _dtype_objection(kernel, x.dtype):
        raise ValueError(f"{kernel.name} {unsuited}. Load the model again with the dtype you want")
    if not x.numel():
        return x.new_empty(*x.shape[:-1], packed.out_features)
    tokens = x.reshape(-1, packed.in_features).contiguous()
    return kernel.linear(tokens, packed, bias).view(*x.shape[:-1], packed.out_features)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that the layer computes with."""
    return _BY_NAME[packed.kernel].dequantize_rows(packed, 0, packed.out_features, dtype)


def _dtype_objection(kernel: Kernel, dtype: torch.dtype) -> str | None:
    if not kernel.dtypes or dtype in kernel.dtypes:
        return None
    takes, got = (" or ".join(str(each).removeprefix("torch.") for each in types)
                  for types in (kernel.dtypes, (dtype,)))  # fmt: skip
    return f"needs {takes} activations, not {got}"
