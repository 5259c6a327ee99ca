"""Codes of a few bits, packed without a gap: the dense bit stream that most integer checkpoints share.

A row of codes of b bits each is one stream: code i occupies the bits [i·b, i·b + b), counted from the
lowest bit of the first 32-bit word, so a code may straddle two words where b does not divide 32. The last
word of a row is filled up with zeros.

Whatever b is, eight codes fill b whole bytes. Eight codes, a byte each, are one 64-bit lane; they are pushed
together by halves, two codes in 16 bits, four in 32, eight in 64, and the lane's lowest b bytes are kept: those
bytes in a row are the stream. Unpacking takes the same steps back. That holds where integers are stored lowest
byte first, as safetensors has them and every machine netsuke runs on. Rows are worked off in chunks that stay
in the processor's cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

CHUNK = 1 << 18
"""Codes in work at once."""


def num_words(columns: int, bits: int) -> int:
    """The 32-bit words that one row of codes takes."""
    return -(-columns * bits // 32)


def pack(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Codes 0 … 2^bits - 1 as a dense bit stream per row. Raises ValueError where a code does not fit."""
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    width = num_words(columns, bits)
    words = torch.empty(rows, width, dtype=torch.int32, device=codes.device)
    for part, out in zip(_chunks(codes, columns), _chunks(words, columns), strict=True):
        spread = torch.zeros(len(part), columns + -columns % 32, dtype=torch.uint8, device=codes.device)
        spread[:, :columns] = part
        for lane, half, held in _steps(bits):
            lanes, field = spread.view(lane), (1 << held) - 1
            upper = (lanes >> half - held).bitwise_and_(field << held)
            lanes.bitwise_and_(field).bitwise_or_(upper)
        if 8 % bits == 0:
            stream = spread.view(_byte_lane(bits)).to(torch.uint8)
        else:
            stream = spread.view(len(part), -1, 8)[..., :bits].contiguous().view(len(part), -1)
        out.copy_(stream.view(torch.int32)[:, :width])
    return words


def unpack(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes that `pack` was given. Raises ValueError where the rows do not hold `columns` codes."""
    _check_bits(bits)
    rows, width = words.shape
    if width != num_words(columns, bits):
        expected = num_words(columns, bits)
        raise ValueError(f"{columns} codes of {bits} bits take {expected} words a row, these rows have {width}")
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)
    for part, out in zip(_chunks(words, columns), _chunks(codes, columns), strict=True):
        stream = torch.nn.functional.pad(part.contiguous(), (0, -width % bits)).view(torch.uint8)
        if 8 % bits == 0:
            spread = stream.to(_byte_lane(bits)).view(torch.uint8)
        else:
            spread = torch.nn.functional.pad(stream.view(len(part), -1, bits), (0, 8 - bits)).view(len(part), -1)
        for lane, half, held in reversed(_steps(bits)):
            lanes, field = spread.view(lane), (1 << held) - 1
            upper = (lanes << half - held).bitwise_and_(field << half)
            lanes.bitwise_and_(field).bitwise_or_(upper)
        out.copy_(spread[:, :columns])
    return codes


def _steps(bits: int) -> list[tuple[torch.dtype, int, int]]:
    """(lane, bits of half a lane, bits of codes that half holds) of each step of packing, narrow lanes first.

    Where a lane's codes make up one whole byte there is no need to go on.
    """
    steps = [(torch.int16, 8, bits), (torch.int32, 16, 2 * bits), (torch.int64, 32, 4 * bits)]
    return {8: [], 4: steps[:1], 2: steps[:2]}.get(bits, steps)


def _byte_lane(bits: int) -> torch.dtype:
    """The lane whose codes make up one byte, for bits that divide 8."""
    steps = _steps(bits)
    return steps[-1][0] if steps else torch.uint8


def _chunks(matrix: Tensor, columns: int) -> tuple[Tensor, ...]:
    """The matrix in runs of rows that hold at most `CHUNK` codes, and one row at least."""
    return matrix.split(max(1, CHUNK // max(1, columns)))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: codes have 1 to 8 bits")
