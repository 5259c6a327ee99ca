"""What this machine can do: versions, the device, and the kernel each scheme would run on.

A kernel is not taken at its word: each one named here first computes a small layer, whose result is compared
with the plain reference.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import quant_kernels
from compress.core.scheme import WEIGHT_BITS, Grid
from quant_kernels import cpu, gpu, native, reference

TYPICAL = 4096
"""Rows and columns of the layer for which a backend is chosen."""
TRIED = (1, 3, 80)
"""Numbers of tokens for which a kernel is tried: a step of decoding, a few, a prompt."""
TOLERANCE = 0.01
"""Relative error up to which a bfloat16 kernel agrees with the reference; rounding alone gives 0.002."""


def diagnose() -> dict[str, Any]:
    """`python, torch, triton, transformers, device, backends: {scheme: {backend, reason}}`; None: absent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "device": describe(device),
        "backends": {f"w{bits}a16": _backend(bits, device) for bits in WEIGHT_BITS},
    }


def describe(device: str) -> str:
    """The device in words, `cpu (AVX512, avx512_bf16; 8 threads)`."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"cuda ({torch.cuda.get_device_name()}, compute capability {major}.{minor})"
    capabilities = torch.cpu.get_capabilities()
    extras = [name for name in ("avx512_bf16", "amx_bf16", "avx512_vnni", "amx_int8") if capabilities.get(name)]
    return f"cpu ({', '.join([cpu.instruction_set(), *extras])}; {torch.get_num_threads()} threads)"


def typical_grid(bits: int) -> Grid:
    """The grid such weights most often have: groups up to 4 bits, one scale per channel above."""
    return Grid(bits, group_size=128 if bits <= 4 else None)


def _backend(bits: int, device: str) -> dict[str, str]:
    grid, dtype = typical_grid(bits), torch.bfloat16
    chosen = quant_kernels.choose(
        bits, grid.group_size, grid.symmetric, dtype, device, in_features=TYPICAL, out_features=TYPICAL
    )
    error = kernel_error(grid, dtype, device)
    verdict = f"agrees with the reference to {error:.1e}"
    if not error <= TOLERANCE:
        verdict = f"COMPUTES WRONGLY HERE, relative error {error:.1e}: load with dtype=torch.float32 and report it"
    groups = "one scale per channel" if grid.group_size is None else f"groups of {grid.group_size}"
    how = "; ".join([chosen.reason, *_for_prompts(chosen.name), verdict])
    return {"backend": chosen.name, "reason": f"{groups}, bfloat16: {how}"}


def _for_prompts(backend: str) -> list[str]:
    """How a CPU kernel unpacks weights, and what it multiplies them in."""
    if not backend.startswith("cpu"):
        return []
    if backend == "cpu_int4" and native.has_matrix_unit():
        return []
    dtype = str(cpu.product_dtype()).removeprefix("torch.")
    words = [f"unpacked weights are multiplied in {dtype}, the faster type here"]
    if backend == "cpu_int4" and native.loops() is None:
        words.append("without a C compiler they are unpacked by torch, which takes several times as long")
    return words


def kernel_error(grid: Grid, dtype: torch.dtype, device: str) -> float:
    """Relative error of the chosen kernel against the reference in float32, on a small random layer, at its worst."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 512, 2048
    codes = torch.randint(int(grid.qmin), int(grid.qmax) + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, grid.num_groups(columns), generator=generator) - 0.5).to(dtype)
    packed = quant_kernels.pack(codes, scale, None, bits=grid.bits, dtype=dtype, device=device)
    plain = reference.pack(codes, scale, None, grid.bits)
    errors = []
    for tokens in (*TRIED, *((gpu.MOST_TOKENS + 1,) if device.startswith("cuda") else ())):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        y = quant_kernels.linear(x.to(device), packed).to("cpu", torch.float32)
        exact = reference.linear_reference(x.to(torch.float32), plain)
        errors.append((y - exact).norm() / exact.norm())
    return float(torch.stack(errors).max())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
