"""Quantized linear layers on a CPU, with the two integer matrix products that torch ships.

`cpu_int4`, codes of 2 to 4 bits: `aten::_weight_int4pack_mm_for_cpu` computes with `w = (u - 8) · scale +
zero`, u in 0 … 15. A signed code is u - 8, and a zero point z on the grid becomes the float `zero = -z ·
scale`. Scales may be negative. It takes groups of 32, 64, 128 or 256 columns and a multiple of 16 rows;
wider groups, and one scale per row, are cut into the widest of these that divides them, each with a copy
of its scale.

`cpu_int8`, symmetric codes of 5 to 8 bits with one scale per row: `aten::_weight_int8pack_mm`. It reads 16
columns at a time and does not check that they are there: with other column counts it computes with foreign
memory, so those layers are refused here.

Both want bfloat16 activations (for others they run scalar loops, slower than the reference) and round
scales to bfloat16. Both serve few tokens best: they unpack the weight anew for every few rows of x. Past a
token count that was measured (README.md) the same bytes are unpacked once, into memory that the next layer uses
again, and multiplied by torch's own product, in whichever of bfloat16 and float32 this processor is faster at. For int4
that is done in C where it can be (`native.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quant_kernels import native
from quant_kernels.layout import LinearSpec, Packed
from quant_kernels.reference import chunks

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
INT8_COLUMNS = 32
INT4_MOST_TOKENS, INT8_MOST_TOKENS = 48, 32
"""Up to so many tokens torch's integer products are quicker than unpacking the weight;"""
INT4_MATRIX_UNIT_TOKENS = 5
"""up to so many, than the matrix unit."""
CHUNK_WEIGHTS = 1 << 25
"""Weights that are unpacked at a time: most layers at once."""
_SCRATCH = threading.local()
"""What weights are unpacked to, one layer's after another's; of each thread its own."""
PAGE = 4096
"""Bytes of memory that a processor fetches ahead in, and not beyond."""
PAIRED_ROWS = 512
"""Fewer rows are not worth the handling of pairs."""
BLOCK_ROWS = {"AVX512": 64, "AVX2": 32}
"""Instruction set → output rows that `_convert_weight_to_int4pack_for_cpu` interleaves."""
PACKED_ROWS = 256
"""Rows that are packed at a time, whole blocks: the op takes codes of four bytes."""
FLOAT32_FASTER = 1.25
"""How much faster float32 must be before it takes the place of bfloat16 in a matrix product."""

Unpack = Callable[[Packed, int, int, Tensor], Tensor]
"""(packed, first row, last row + 1, buffer) → those rows, transposed to [in, rows], in the buffer and its type."""


def instruction_set() -> str:
    """The widest instructions torch was built for and this processor has, such as `AVX512`."""
    return torch.backends.cpu.get_cpu_capability()


def op_exists(name: str) -> bool:
    """Whether this torch has a CPU kernel for `aten::<name>`. These ops are private and may go."""
    return hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU")


def int4_objection(spec: LinearSpec) -> str | None:
    """Why `cpu_int4` cannot run this layer; None where it can."""
    if spec.bits > 4:
        return f"holds codes of up to 4 bits, not {spec.bits}"
    if _int4_group(spec.columns_per_scale) is None:
        return f"needs groups of a multiple of {INT4_GROUPS[-1]} columns, not {spec.columns_per_scale}"
    if spec.out_features % INT4_ROWS:
        return f"needs out_features to be a multiple of {INT4_ROWS}, not {spec.out_features}"
    return _op_objection("_weight_int4pack_mm_for_cpu")


def int8_objection(spec: LinearSpec) -> str | None:
    """Why `cpu_int8` cannot run this layer; None where it can."""
    if spec.bits <= 4:
        return f"would spend a byte on each code of {spec.bits} bits"
    if not spec.symmetric or spec.columns_per_scale != spec.in_features:
        return "needs symmetric codes with one scale per output channel"
    if spec.in_features % INT8_COLUMNS:
        return f"needs in_features to be a multiple of {INT8_COLUMNS}, not {spec.in_features}"
    return _op_objection("_weight_int8pack_mm")


def pack_int4(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: uint8 [out, in / 2] as the op wants them; scale: bfloat16 [groups, out, 2], scale and zero."""
    rows, columns = codes.shape
    group = _int4_group(columns // scale.shape[1])
    assert group is not None, "int4_objection refuses these groups"
    zero = torch.zeros_like(scale) if zero_point is None else -zero_point * scale.to(torch.float32)
    both = torch.stack((scale.to(torch.bfloat16), zero.to(torch.bfloat16)), dim=-1)
    both = both.repeat_interleave(columns // scale.shape[1] // group, dim=1).transpose(0, 1).contiguous()
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, PACKED_ROWS):
        some = codes[start : start + PACKED_ROWS].to(torch.int32).add_(8)
        packed[start : start + PACKED_ROWS] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(some, 1)
    return Packed("cpu_int4", bits, rows, columns, packed, both, None)


def pack_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: int8 [out, in]; scale: bfloat16 [out]."""
    rows, columns = codes.shape
    assert zero_point is None, "int8_objection refuses asymmetric codes"
    stored = codes.contiguous()
    return Packed("cpu_int8", bits, rows, columns, stored, scale.squeeze(1).to(torch.bfloat16), None)


def linear_int4(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both bfloat16."""
    group = packed.in_features // packed.scale.shape[0]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed.codes, group, packed.scale)
    return y if bias is None else y + bias


def linear_int4_dot(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for one token, where `native.has_dots()`."""
    loops = native.loops()
    assert loops is not None, "the route is open only where there are loops"
    if packed.out_features % native.BLOCK_ROWS or len(x) != 1:
        return linear_int4(x, packed, bias)
    y = x.new_empty(1, packed.out_features)
    loops.dot(x, packed.codes, packed.scale, y)
    return y if bias is None else y.add_(bias)


def linear_int4_matrix_unit(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for more than a few tokens, where `native.has_matrix_unit()`."""
    loops = native.loops()
    assert loops is not None, "the route is open only where there are loops"
    y = x.new_empty(x.shape[0], packed.out_features)
    loops.multiply(x, packed.codes, packed.scale, y)
    if rest := packed.out_features % native.BLOCK_ROWS:
        start = packed.out_features - rest
        y[:, start:] = x @ dequantize_int4_rows(packed, start, packed.out_features, x.dtype).T
    return y if bias is None else y.add_(bias)


def linear_int4_by_chunks(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for many tokens."""
    return _linear_by_chunks(x, packed, bias, _unpack_int4)


def linear_int8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both bfloat16."""
    if x.shape[0] == 1 and _pairs_are_faster(packed):
        y = _linear_by_pairs(x, packed)
    else:
        y = torch.ops.aten._weight_int8pack_mm(x, packed.codes, packed.scale)
    return y if bias is None else y + bias


def linear_int8_by_chunks(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for many tokens."""
    return _linear_by_chunks(x, packed, bias, _unpack_int8, packed.scale)


def dequantize_int4_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight as the op understands its own bytes."""
    buffer = torch.empty((stop - start) * packed.in_features)
    return _unpack_int4(packed, start, stop, buffer).T.to(dtype)


def dequantize_int8_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight."""
    scale = packed.scale[start:stop, None].to(torch.float32)
    return packed.codes[start:stop].to(torch.float32).mul_(scale).to(dtype)


@cache
def product_dtype() -> torch.dtype:
    """The type this processor multiplies large matrices in: bfloat16, or float32 where that is faster.

    Instructions do not tell: with AVX512-BF16 but no matrix unit, one make is twice as fast in float32 and another
    in bfloat16. So it is measured, once, in some milliseconds.
    """
    a, b = torch.ones(128, 1024), torch.ones(256, 1024)

    def seconds(a: Tensor, b: Tensor) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    in_bfloat16 = seconds(a.to(torch.bfloat16), b.to(torch.bfloat16))
    return torch.float32 if FLOAT32_FASTER * seconds(a, b) < in_bfloat16 else torch.bfloat16


def _pairs_are_faster(packed: Packed) -> bool:
    """Whether rows are shorter than a page and pairs of them are not."""
    rows, columns = packed.out_features, packed.in_features
    return columns < PAGE <= 2 * columns and rows >= PAIRED_ROWS and rows % 2 == 0


def _linear_by_pairs(x: Tensor, packed: Packed) -> Tensor:
    """The int8 product of one token with rows taken two by two, [out / 2, 2 · in]: the same bytes, streamed faster.

    The op reads four rows at once. Rows shorter than a page are several streams in one page, and fetching ahead follows
    one. A pair of rows meets the token twice, once before zeros and once behind zeros.
    """
    columns = packed.in_features
    twice = x.new_zeros(2, 2 * columns)
    twice[0, :columns] = twice[1, columns:] = x[0]
    pairs = packed.codes.view(-1, 2 * columns)
    y = torch.ops.aten._weight_int8pack_mm(twice, pairs, x.new_ones(len(pairs)))
    return y.T.reshape(1, -1) * packed.scale


def _linear_by_chunks(
    x: Tensor, packed: Packed, bias: Tensor | None, unpack: Unpack, scale: Tensor | None = None
) -> Tensor:
    """x [tokens, in] → [tokens, out]; `scale` [out] is for what `unpack` leaves unscaled."""
    inputs = x.to(product_dtype())
    parts = []
    for start, stop in chunks(packed, CHUNK_WEIGHTS):
        weight = _scratch((stop - start) * packed.in_features, inputs.dtype)
        part = inputs @ unpack(packed, start, stop, weight)
        if scale is not None:
            part.mul_(scale[start:stop])
        parts.append(part if bias is None else part.add_(bias[start:stop]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(x.dtype)


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    """Memory for so many numbers, kept from call to call: what the system gives anew it fills with zeros first."""
    kept: Tensor | None = getattr(_SCRATCH, str(dtype), None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            kept = torch.empty(size, dtype=dtype)
        setattr(_SCRATCH, str(dtype), kept)
    return kept[:size]


def _unpack_int8(packed: Packed, start: int, stop: int, buffer: Tensor) -> Tensor:
    """The codes as they are."""
    return buffer.view(stop - start, -1).copy_(packed.codes[start:stop]).T


def _unpack_int4(packed: Packed, start: int, stop: int, buffer: Tensor) -> Tensor:
    """The inverse of `_convert_weight_to_int4pack_for_cpu` for some rows, and their scales and zeros applied."""
    out = buffer.view(packed.in_features, stop - start)
    codes, grid = packed.codes[start:stop], packed.scale[:, start:stop].contiguous()
    loops = native.loops() if (stop - start) % native.BLOCK_ROWS == 0 and out.dtype == torch.bfloat16 else None
    if loops is None:
        return out.copy_(_unpack_int4_by_torch(codes, grid))
    loops.unpack(codes, grid, out)
    return out


def _unpack_int4_by_torch(codes: Tensor, grid: Tensor) -> Tensor:
    """The same for codes [rows, in / 2] and scales and zeros [groups, rows, 2], in float32.

    A block of 64 rows (with AVX2: 32) is stored column by column, half as many bytes each: byte i holds row i in its
    low nibble and row i + 32 (with AVX2: i + 16) in its high one. In a last, smaller block, byte i holds rows 2i and
    2i + 1.
    """
    scale, zero = grid[:, None].permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    rows, columns, block = len(codes), 2 * codes.shape[1], BLOCK_ROWS[instruction_set()]
    whole = rows // block * block
    stored = codes.view(-1)
    weight = scale.new_empty(columns, rows)
    halves = stored[: whole * columns // 2].view(-1, columns, block // 2).transpose(0, 1)
    unpacked = weight[:, :whole].view(columns, -1, 2, block // 2)
    unpacked[:, :, 0], unpacked[:, :, 1] = halves & 15, halves >> 4
    if whole < rows:
        pairs = stored[whole * columns // 2 :].view(columns, -1)
        weight[:, whole::2], weight[:, whole + 1 :: 2] = pairs & 15, pairs >> 4
    grouped = weight.view(len(scale), -1, rows)
    torch.addcmul(zero - 8 * scale, grouped, scale, out=grouped)
    return weight


def _int4_group(columns_per_scale: int) -> int | None:
    """The widest group the int4 op takes that divides the layer's own."""
    return next((group for group in INT4_GROUPS if columns_per_scale % group == 0), None)


def _op_objection(op: str) -> str | None:
    """Why an op of torch would not run, or not run fast, on this processor."""
    if not op_exists(op):
        return f"needs aten::{op}, which torch {torch.__version__} does not have"
    if instruction_set() not in BLOCK_ROWS:
        return f"needs {' or '.join(BLOCK_ROWS)}, this processor has {instruction_set()}"
    return None
