"""What `bench_kernels.py` and `tune_kernels.py` share: layers, our operators on them, a roofline, a stopwatch."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_kernels import fp4, fp8, w4a8, w8a8, w8a16, wna16
from quant_kernels.byte_planes import pack_groups
from quant_kernels.fp8 import GROUP, pack_words
from quant_kernels.packed_codes import code_shape
from quant_kernels.words import word_shape

GROUP_SIZE = 128
"""Inputs that share a scale in 2- to 4-bit weights with 16-bit activations."""
COLD_BYTES = 200e6
"""Weights to walk through before one is met again: more than any cache holds."""
REPLAY_SECONDS = 1e-3
"""A replay should last as long, so that starting it does not count."""


class Layer(NamedTuple):
    """The shape of a weight."""

    outputs: int
    inputs: int


LAYERS = {
    "8B qkv": Layer(6144, 4096),
    "8B o": Layer(4096, 4096),
    "8B gate+up": Layer(28672, 4096),
    "8B down": Layer(4096, 14336),
    "70B qkv": Layer(10240, 8192),
    "70B o": Layer(8192, 8192),
    "70B gate+up": Layer(57344, 8192),
    "70B down": Layer(8192, 28672),
}
"""The linear layers of Llama 3, those that read the same activations as one."""


@dataclass(frozen=True)
class Scheme:
    """What a layer must at least read and compute, in whatever kernel."""

    bytes_per_weight: float
    bytes_per_activation: int
    arithmetic: str
    """What the matrix instructions multiply."""


SCHEMES = {
    "bf16": Scheme(2, 2, "bf16"),
    "w2a16": Scheme(0.25 + 2 / GROUP_SIZE, 2, "bf16"),
    "w3a16": Scheme(0.375 + 2 / GROUP_SIZE, 2, "bf16"),
    "w4a16": Scheme(0.5 + 2 / GROUP_SIZE, 2, "bf16"),
    "nvfp4": Scheme(0.5 + 1 / 16, 2, "bf16"),
    "w8a16": Scheme(1, 2, "bf16"),
    "w4a8": Scheme(0.5, 1, "8-bit"),
    "w8a8": Scheme(1, 1, "8-bit"),
}


@dataclass(frozen=True)
class Device:
    """What a GPU can do."""

    bytes_per_second: float
    operations_per_second: dict[str, float]


def measured_limits(replays: int) -> Device:
    """Of the GPU here: by copying a gibibyte, and by large products in its libraries."""
    size = 8192
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    dense = torch.randn(size, size, device="cuda").to(torch.bfloat16)
    codes = random_bytes((size, size), torch.int8, "cuda")
    products = {"bf16": lambda _: dense @ dense.T, "8-bit": lambda _: torch._int_mm(codes, codes.T)}
    return Device(
        2 * source.nbytes / median_seconds(lambda _: target.copy_(source), [None], 1e-4, replays),
        {name: 2 * size**3 / median_seconds(call, [None], 1e-3, replays) for name, call in products.items()},
    )


def roofline_seconds(scheme: str, layer: Layer, tokens: int, device: Device) -> float:
    """The least time for reading weights and activations, writing 16-bit results, and for the products."""
    needs = SCHEMES[scheme]
    weights = layer.outputs * layer.inputs
    moved = weights * needs.bytes_per_weight + tokens * (layer.inputs * needs.bytes_per_activation + layer.outputs * 2)
    return max(moved / device.bytes_per_second, 2 * tokens * weights / device.operations_per_second[needs.arithmetic])


@dataclass(frozen=True)
class Kernel:
    """One way to compute a layer."""

    name: str
    scheme: str
    weights: Callable[[Layer, str], Any]
    """Random ones for a layer, on a device: tensors, or a module."""
    activations: Callable[[int, int, str], Sequence[Tensor]]
    """Random ones, [tokens, inputs], on a device."""
    run: Callable[[Any, Sequence[Tensor]], Tensor]
    note: str = ""
    """What it does more, or less, than the product and its scales."""
    least_tokens: int = 1


def bf16_activations(tokens: int, inputs: int, device: str) -> Sequence[Tensor]:
    return (torch.randn(tokens, inputs, device=device).to(torch.bfloat16),)


def int8_activations(tokens: int, inputs: int, device: str) -> Sequence[Tensor]:
    """Codes, a scale per token, and the sums of the codes."""
    codes = random_bytes((tokens, inputs), torch.int8, device)
    return codes, torch.full((tokens,), 0.01, device=device), codes.sum(dim=1, dtype=torch.int32)


def fp8_activations(tokens: int, inputs: int, device: str) -> Sequence[Tensor]:
    """Codes, and a scale per token."""
    return _random_fp8(tokens, inputs, device), torch.full((tokens,), 0.01, device=device)


def fp8_grouped_activations(tokens: int, inputs: int, device: str) -> Sequence[Tensor]:
    """Codes, and a scale per token and group of inputs."""
    return _random_fp8(tokens, inputs, device), torch.full((tokens, math.ceil(inputs / GROUP)), 0.01, device=device)


def _random_fp8(rows: int, columns: int, device: str) -> Tensor:
    return (torch.randn(rows, columns, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_bytes(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype, device=device)


def _wna16(bits: int) -> Kernel:
    def weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
        return random_bytes(code_shape(*layer, bits), torch.int16, device), _group_scales(layer, device)

    def run(weights: Any, x: Sequence[Tensor]) -> Tensor:
        return torch.ops.netsuke.wna16(x[0], *weights, bits)

    return Kernel(f"w{bits}a16", f"w{bits}a16", weights, bf16_activations, run)


def _group_scales(layer: Layer, device: str) -> Tensor:
    scale = torch.rand(layer.inputs // GROUP_SIZE, layer.outputs, device=device)
    return (scale * 0.01).to(torch.bfloat16)


def _w8a16_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    scale = torch.rand(1, layer.outputs, device=device) * 0.001
    return random_bytes(layer, torch.int8, device), scale.to(torch.bfloat16)


def _nvfp4_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor, Tensor]:
    words = random_bytes(word_shape(*layer), torch.int16, device)
    scale = torch.randint(0x30, 0x40, (layer.inputs // 64, layer.outputs, 4), dtype=torch.uint8, device=device)
    return words, scale.view(torch.int32).squeeze(2), torch.full((1,), 100.0, device=device)


def _w4a8_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.rand(layer.outputs, device=device) * 0.01
    return random_bytes((layer.outputs, layer.inputs // 2), torch.uint8, device), scale, 8 * scale


def _w4a8_grouped_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale, _ = _w4a8_weights(layer, device)
    shape = (layer.outputs, layer.inputs // 64)
    steps, offsets = torch.randint(1, 9, shape, device=device), torch.randint(-64, 1, shape, device=device)
    return weight, scale, pack_groups(steps, offsets)


def _w8a8_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    return random_bytes(layer, torch.int8, device), torch.rand(layer.outputs, device=device) * 1e-4


def _fp8_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    return _random_fp8(*layer, device), torch.rand(layer.outputs, device=device) * 1e-4


def _fp8_grouped_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    groups = [math.ceil(length / GROUP) for length in layer]
    return _random_fp8(*layer, device), torch.rand(groups, device=device) * 1e-4


def _w8a16_fp8_weights(layer: Layer, device: str) -> tuple[Tensor, Tensor]:
    weight, scale = _fp8_weights(layer, device)
    return pack_words(weight), scale


QUANTIZED = "activations come quantized"
OURS = {
    "w2a16": _wna16(2), "w3a16": _wna16(3), "w4a16": _wna16(4),
    "w8a16": Kernel(
        "w8a16", "w8a16", _w8a16_weights, bf16_activations,
        lambda weights, x: torch.ops.netsuke.w8a16(x[0], *weights),
    ),
    "w4a16_fp4": Kernel(
        "w4a16_fp4", "nvfp4", _nvfp4_weights, bf16_activations,
        lambda weights, x: torch.ops.netsuke.w4a16_fp4(x[0], *weights), "NVFP4: groups of 16",
    ),
    "w8a16_fp8": Kernel(
        "w8a16_fp8", "w8a16", _w8a16_fp8_weights, bf16_activations,
        lambda weights, x: torch.ops.netsuke.w8a16_fp8(x[0], *weights),
    ),
    "w4a8": Kernel(
        "w4a8", "w4a8", _w4a8_weights, int8_activations,
        lambda weights, x: torch.ops.netsuke.w4a8(*x, *weights, None, torch.bfloat16), QUANTIZED,
    ),
    "w4a8_grouped": Kernel(
        "w4a8_grouped", "w4a8", _w4a8_grouped_weights, int8_activations,
        lambda weights, x: torch.ops.netsuke.w4a8_grouped(*x[:2], *weights, None, torch.bfloat16),
        f"{QUANTIZED}; groups of 64",
    ),
    "w8a8": Kernel(
        "w8a8", "w8a8", _w8a8_weights, int8_activations,
        lambda weights, x: torch.ops.netsuke.w8a8(*x[:2], *weights, None, None, None, torch.bfloat16), QUANTIZED,
    ),
    "fp8": Kernel(
        "fp8", "w8a8", _fp8_weights, fp8_activations,
        lambda weights, x: torch.ops.netsuke.fp8(*x, *weights, None, torch.bfloat16), QUANTIZED,
    ),
    "fp8_grouped": Kernel(
        "fp8_grouped", "w8a8", _fp8_grouped_weights, fp8_grouped_activations,
        lambda weights, x: torch.ops.netsuke.fp8(*x, *weights, None, torch.bfloat16),
        f"{QUANTIZED}; scales of {GROUP} inputs and of {GROUP} × {GROUP} weights",
    ),
}  # fmt: skip
"""This package's operators. Scales are such that results of random data are of ordinary size."""
MODULES = {
    "w2a16": wna16, "w3a16": wna16, "w4a16": wna16, "w8a16": w8a16, "w4a16_fp4": fp4, "w8a16_fp8": fp8,
    "w4a8": w4a8, "w4a8_grouped": w4a8, "w8a8": w8a8, "fp8": fp8, "fp8_grouped": fp8,
}  # fmt: skip
"""Operator → the file whose `configuration` launches it."""


def cold_copies(weights: Any, nbytes: float) -> list[Any]:
    """The weights, of `nbytes`, and as many copies as no cache can hold."""
    return [weights, *(deepcopy(weights) for _ in range(math.ceil(COLD_BYTES / nbytes) - 1))]


def median_seconds(call: Callable[[Any], object], copies: Sequence[Any], expected: float, replays: int) -> float:
    """Of one call, among calls in a row on one copy after the other, replayed as a CUDA graph.

    `expected`: seconds that a call takes at least, by which the length of the row is chosen.
    """
    row = [copies[index % len(copies)] for index in range(max(len(copies), math.ceil(REPLAY_SECONDS / expected)))]
    for each in copies:  # compiles, tunes and allocates, which a capture must not
        call(each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in row:
            call(each)
    times = []
    for replay in range(-3, replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 0:
            times.append(start.elapsed_time(end) / 1e3 / len(row))
    return statistics.median(times)


def missing_device() -> str | None:
    """What to say where there is no GPU to time."""
    if torch.cuda.is_available():
        return None
    return "error: torch sees no CUDA device here, and there is nothing to time without one."


def say(words: str) -> None:
    """To stderr: results alone go to stdout."""
    print(words, file=sys.stderr, flush=True)
