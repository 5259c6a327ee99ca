"""What this machine can do: versions, the device, and the kernel each scheme would run on.

A kernel is not taken at its word: each one named here first computes a small layer, whose result is compared
with the plain reference.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

import quant_kernels
from compress.core.inputs import round_inputs
from compress.core.scheme import WEIGHT_BITS, Grid, Scheme, parse_scheme
from compress.core.sparsity import keep_largest, parse_pattern
from compress.quantize.rtn import rtn
from compress.runtime.modules import QuantLinear, levels_of, weight_levels
from compress.runtime.sparse import SparseLinear, backend_for
from quant_kernels import cpu, gpu, native

SCHEMES = (*(f"w{bits}a16" for bits in WEIGHT_BITS), "w8a8", "w4a8", "fp8", "fp8a16", "nvfp4a16", "mxfp4a16", "w4a4")
"""What is told about, and 2:4 sparse weights."""
TYPICAL = 4096
"""Rows and columns of the layer for which a backend is chosen."""
TRIED = (1, 3, 80)
"""Numbers of tokens for which a kernel is tried: a step of decoding, a few, a prompt."""
TOLERANCE = 0.02
"""Relative error up to which a bfloat16 kernel agrees with the reference; rounding alone gives 0.002, and 0.01 where
a kernel rounds inputs on a grid of its own (max / 127, not 127.5)."""


def diagnose() -> dict[str, Any]:
    """`python, torch, triton, transformers, device, backends: {scheme: {backend, reason}}`; None: absent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "device": describe(device),
        "backends": {
            **{name: _backend(parse_scheme(name), device) for name in SCHEMES},
            "2:4": _sparse_backend(device),
        },
    }


def describe(device: str) -> str:
    """The device in words, `cpu (AVX512, avx512_bf16; 8 threads)`."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"cuda ({torch.cuda.get_device_name()}, compute capability {major}.{minor})"
    capabilities = torch.cpu.get_capabilities()
    extras = [name for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "amx_int8") if capabilities.get(name)]
    return f"cpu ({', '.join([cpu.instruction_set(), *extras])}; {torch.get_num_threads()} threads)"


def _backend(scheme: Scheme, device: str) -> dict[str, str]:
    grid, dtype = scheme.weights, torch.bfloat16
    chosen = quant_kernels.choose(
        grid.bits,
        grid.group_size,
        grid.symmetric,
        dtype,
        device,
        in_features=TYPICAL,
        out_features=TYPICAL,
        levels=weight_levels(grid),
        inputs=levels_of(scheme.inputs),
    )
    verdict = _verdict(kernel_error(scheme, dtype, device))
    groups = "one scale per channel" if grid.group_size is None else f"groups of {grid.group_size}"
    by_itself = chosen.name in {kernel.name for kernel in quant_kernels.KERNELS if kernel.inputs}
    rounding = ["inputs are rounded before, by torch"] if scheme.inputs and not by_itself else []
    how = "; ".join([chosen.reason, *rounding, *_for_prompts(chosen.name), verdict])
    return {"backend": chosen.name, "reason": f"{groups}, bfloat16: {how}"}


def _sparse_backend(device: str) -> dict[str, str]:
    backend, reason = backend_for((TYPICAL, TYPICAL), torch.bfloat16, device)
    return {"backend": backend, "reason": f"bfloat16: {reason}; {_verdict(sparse_error(torch.bfloat16, device))}"}


def _verdict(error: float) -> str:
    if not error <= TOLERANCE:
        return f"COMPUTES WRONGLY HERE, relative error {error:.1e}: load with dtype=torch.float32 and report it"
    return f"agrees with the reference to {error:.1e}"


def _for_prompts(backend: str) -> list[str]:
    """How a CPU kernel unpacks weights, and what it multiplies them in."""
    if not backend.startswith("cpu"):
        return []
    if backend == "cpu_int4" and native.has_matrix_unit():
        return []
    dtype = str(cpu.product_dtype()).removeprefix("torch.")
    words = [f"unpacked weights are multiplied in {dtype}, the faster type here"]
    if backend == "cpu_int4" and native.loops() is None:
        words.append("without AVX512 and a C compiler they are unpacked by torch, which takes several times as long")
    return words


def kernel_error(scheme: Scheme, dtype: torch.dtype, device: str) -> float:
    """Relative error of the chosen kernel against float32 arithmetic, on a small random layer, at its worst."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 512, 2048
    weight = rtn(torch.randn(rows, columns, generator=generator), scheme.weights, scale_dtype=dtype)
    layer = QuantLinear.from_quantized(weight, inputs=scheme.inputs, dtype=dtype, device=device)
    return _error(layer, weight.dequantize(), scheme.inputs, dtype, device)


def sparse_error(dtype: torch.dtype, device: str) -> float:
    """The same of a layer of 2:4 sparse weights."""
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = weight * keep_largest(weight.float().abs(), parse_pattern("2:4"))
    return _error(SparseLinear(weight, dtype=dtype, device=device), weight.float(), None, dtype, device)


def _error(layer: nn.Module, weight: Tensor, inputs: Grid | None, dtype: torch.dtype, device: str) -> float:
    generator = torch.Generator().manual_seed(1)
    errors = []
    for tokens in (*TRIED, *((gpu.MOST_TOKENS + 1,) if device.startswith("cuda") else ())):
        x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
        y = layer(x.to(device)).to("cpu", torch.float32)
        exact = (round_inputs(x.float(), inputs) if inputs else x.float()) @ weight.T
        errors.append((y - exact).norm() / exact.norm())
    return float(torch.stack(errors).max())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
