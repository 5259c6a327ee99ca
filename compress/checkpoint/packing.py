"""Codes of a few bits, packed without a gap: the dense bit stream that most integer checkpoints share.

A row of codes of b bits each is one stream: code i occupies the bits [i·b, i·b + b), counted from the
lowest bit of the first 32-bit word, so a code may straddle two words where b does not divide 32. The last
word of a row is filled up with zeros.

Whatever b is, eight codes fill b whole bytes. So eight codes are gathered in one 64-bit lane, the lane's
lowest b bytes are kept, and those bytes in a row are the stream. That holds where integers are stored
lowest byte first, as safetensors has them and every machine netsuke runs on. Rows are worked off in chunks,
so that the lanes never take more memory than `CHUNK` codes do.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

CHUNK = 1 << 20
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
        padded = torch.nn.functional.pad(part.contiguous(), (0, -columns % 32)).view(len(part), -1, 8)
        lanes = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
        for index in range(8):
            lanes |= padded[..., index].to(torch.int64) << index * bits
        kept = lanes.unsqueeze(-1).view(torch.uint8)[..., :bits].contiguous()
        out.copy_(kept.view(len(part), -1).view(torch.int32)[:, :width])
    return words


def unpack(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes that `pack` was given. Raises ValueError where the rows do not hold `columns` codes."""
    _check_bits(bits)
    rows, width = words.shape
    if width != num_words(columns, bits):
        expected = num_words(columns, bits)
        raise ValueError(f"{columns} codes of {bits} bits take {expected} words a row, these rows have {width}")
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for part, out in zip(_chunks(words, columns), _chunks(codes, columns), strict=True):
        stream = torch.nn.functional.pad(part.contiguous(), (0, -width % bits)).view(torch.uint8)
        lanes = torch.nn.functional.pad(stream.view(len(part), -1, bits), (0, 8 - bits)).view(torch.int64)
        spread = torch.cat([(lanes >> index * bits & mask).to(torch.uint8) for index in range(8)], dim=-1)
        out.copy_(spread.view(len(part), -1)[:, :columns])
    return codes


def _chunks(matrix: Tensor, columns: int) -> tuple[Tensor, ...]:
    """The matrix in runs of rows that hold at most `CHUNK` codes, and one row at least."""
    return matrix.split(max(1, CHUNK // max(1, columns)))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: codes have 1 to 8 bits")
