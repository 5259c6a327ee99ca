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
token count that was measured (README.md) it is quicker to unpack once and use torch's own product, from
the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.layout import LinearSpec, Packed
from quant_kernels.reference import linear_by_rows

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
INT8_COLUMNS = 32
INT4_MAX_TOKENS = 64
INT8_MAX_TOKENS = 16
BLOCK_ROWS = {"AVX512": 64, "AVX2": 32}
"""Instruction set → output rows that `_convert_weight_to_int4pack_for_cpu` interleaves."""


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
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    return Packed("cpu_int4", bits, rows, columns, packed, both, None)


def pack_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: int8 [out, in]; scale: bfloat16 [out]."""
    rows, columns = codes.shape
    assert zero_point is None, "int8_objection refuses asymmetric codes"
    stored = codes.contiguous()
    return Packed("cpu_int8", bits, rows, columns, stored, scale.squeeze(1).to(torch.bfloat16), None)


def linear_int4(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both bfloat16."""
    if x.shape[0] > INT4_MAX_TOKENS:
        return linear_by_rows(x, packed, bias, dequantize_int4_rows)
    group = packed.in_features // packed.scale.shape[0]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed.codes, group, packed.scale)
    return y if bias is None else y + bias


def linear_int8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both bfloat16."""
    if x.shape[0] > INT8_MAX_TOKENS:
        return linear_by_rows(x, packed, bias, dequantize_int8_rows)
    y = torch.ops.aten._weight_int8pack_mm(x, packed.codes, packed.scale)
    return y if bias is None else y + bias


def dequantize_int4_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight as the op understands its own bytes."""
    groups = packed.scale.shape[0]
    codes = _unpack_int4_rows(packed, start, stop)
    scale, zero = packed.scale[:, start:stop].to(torch.float32).permute(2, 1, 0).unsqueeze(-1)
    grouped = codes.to(torch.float32).view(stop - start, groups, -1)
    return grouped.sub_(8).mul_(scale).add_(zero).view(stop - start, -1).to(dtype)


def dequantize_int8_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight."""
    scale = packed.scale[start:stop, None].to(torch.float32)
    return packed.codes[start:stop].to(torch.float32).mul_(scale).to(dtype)


def _unpack_int4_rows(packed: Packed, start: int, stop: int) -> Tensor:
    """The inverse of `_convert_weight_to_int4pack_for_cpu` for some rows: uint8 [rows, in] of 0 … 15.

    A block of 64 rows (with AVX2: 32) is stored column by column, half as many bytes each: byte i holds
    row i in its low nibble and row i + 32 (with AVX2: i + 16) in its high one. In a last, smaller block,
    byte i holds rows 2i and 2i + 1.
    """
    columns, block = packed.in_features, BLOCK_ROWS[instruction_set()]
    stored = packed.codes[start:stop].view(-1)
    whole = (stop - start) // block * block
    nibbles = stored[: whole * columns // 2].view(-1, columns, block // 2).transpose(1, 2).contiguous()
    halves = torch.stack((nibbles & 15, nibbles >> 4), dim=1).view(whole, columns)
    if whole == stop - start:
        return halves
    nibbles = stored[whole * columns // 2 :].view(columns, -1).T
    pairs = torch.stack((nibbles & 15, nibbles >> 4), dim=1).view(-1, columns)
    return torch.cat((halves, pairs))


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
