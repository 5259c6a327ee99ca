"""The tensors of one side of a cache layer, of keys or of values, and what is done to rows of them.

*Slots* hold tokens as they are, *planes* in few bits (`quant_kernels.kv_planes`). Both are allocated with room for
more. How many tokens of each sequence are in them is the layer's business (`compress.runtime.cache`), which says where
to write, row by row, for sequences of a batch may have different numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compress.core.kv import TOKENS
from compress.core.scheme import Grid
from quant_kernels.kv_planes import KVFormat, Planes, dequantize, quantize


class Side:
    """Keys, or values, [batch, kv_heads, …, D]; none at first, of the shape and type of `x`.

    `scale`: float [kv_heads], calibrated, for fp8; None: 1.
    """

    def __init__(self, x: Tensor, grid: Grid, scale: Tensor | None) -> None:
        self.format = kv_format(grid)
        self.group = TOKENS if self.format.per == "channel" else 1
        """Quantized tokens that share scales, and stay or go together."""
        self.slots = x.new_zeros(*x.shape[:2], 0, x.shape[3])
        self.planes = self._planes(0)
        if self.format.levels == "fp8":
            scale = self.planes.scale if scale is None else scale
            self.planes = self.planes._replace(scale=scale.to(x.device, torch.float32).contiguous())

    @property
    def num_slots(self) -> int:
        return self.slots.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for in the planes."""
        return self.planes.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.planes.nbytes

    def room_nbytes(self, recent: Sequence[int], quantized: Sequence[int]) -> int:
        """Bytes that are allocated beyond so many slots and quantized tokens of each sequence."""
        used = [(self.slots, self.num_slots, recent)]
        used += [(part, self.capacity, quantized) for _, part, _ in self._parts(self.planes)]
        return sum(
            part.nbytes - part.nbytes * sum(counts) // (len(counts) * room) for part, room, counts in used if room
        )

    def keep(self, x: Tensor, rows: Sequence[int], starts: Sequence[int]) -> None:
        """Put tokens x [rows, kv_heads, tokens, D] into slots."""
        write(self.slots, x, rows, starts)

    def quantize(self, x: Tensor, rows: Sequence[int], starts: Sequence[int]) -> None:
        """Put tokens x [rows, kv_heads, tokens, D] into the planes."""
        new = self._quantized(x)
        for (_, stored, shared), (_, part, _) in zip(self._parts(self.planes), self._parts(new), strict=True):
            write(stored, part, rows, [start // shared for start in starts])

    def rounded(self, x: Tensor) -> Tensor:
        """Tokens x [rows, kv_heads, tokens, D] as what their codes stand for."""
        return dequantize(self._quantized(x), self.format).to(x.dtype)

    def remove_slots(self, rows: Sequence[int], start: int, count: int) -> None:
        """Move up what comes after so many slots."""
        index = slice(None) if len(rows) == len(self.slots) else [*rows]
        self.slots[index, :, start:-count] = self.slots[index, :, start + count :].clone()

    def restore(self, row: int, start: int, count: int, slot: int) -> None:
        """Put so many quantized tokens into slots, as what their codes stand for. `start`: where a group begins."""
        end = start + -(-count // self.group) * self.group
        parts = {name: part[row : row + 1, :, start // shared : end // shared]
                 for name, part, shared in self._parts(self.planes)}  # fmt: skip
        tokens = dequantize(self.planes._replace(**parts), self.format)
        self.slots[row, :, slot : slot + count] = tokens[0, :, :count]

    def resize_slots(self, num_slots: int) -> None:
        old, kept = self.slots, min(num_slots, self.num_slots)
        self.slots = old.new_zeros(*old.shape[:2], num_slots, old.shape[3])
        self.slots[:, :, :kept] = old[:, :, :kept]

    def resize_planes(self, capacity: int, starts: Sequence[int], count: int) -> None:
        """Keep so many quantized tokens of each row, from `start` on."""
        new = self._planes(capacity)
        if self.format.levels == "fp8":
            new = new._replace(scale=self.planes.scale)
        for (_, old, shared), (_, part, _) in zip(self._parts(self.planes), self._parts(new), strict=True):
            kept = taken(old, [start // shared for start in starts], -(-count // shared))
            write(part, kept, range(len(part)), [0] * len(part))
        self.planes = new

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.slots = self.slots.index_select(0, rows)
        parts = {name: part.index_select(0, rows) for name, part, _ in self._parts(self.planes)}
        self.planes = self.planes._replace(**parts)

    def _quantized(self, x: Tensor) -> Planes:
        static = self.planes.scale if self.format.levels == "fp8" else None
        return quantize(x, self.format, self.slots.dtype, static)

    def _planes(self, capacity: int) -> Planes:
        batch, kv_heads, _, head_dim = self.slots.shape
        return self.format.new(batch, kv_heads, capacity, head_dim, self.slots.dtype, self.slots.device)

    def _parts(self, planes: Planes) -> Iterator[tuple[str, Tensor, int]]:
        """What there is of each sequence: its name, the tensor, and how many tokens share an entry."""
        yield "codes", planes.codes, 1
        if self.format.levels == "int":
            yield "scale", planes.scale, self.group
        if planes.minimum is not None:
            yield "minimum", planes.minimum, self.group


def kv_format(grid: Grid) -> KVFormat:
    """A grid of keys or values as kernels know it."""
    if grid.rows == TOKENS:
        return KVFormat(grid.bits, "channel")
    return KVFormat(grid.bits, "token", grid.group_size, "fp8" if grid.kind == "float" else "int")


def taken(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """x[row, :, start : start + count] of each row; beyond the end, the last entry again."""
    if len(set(starts)) == 1 and starts[0] + count <= x.shape[2]:
        return x[:, :, starts[0] : starts[0] + count]
    rows, places = _places(range(len(x)), starts, count, x.device)
    return x[rows, :, places.clamp(max=x.shape[2] - 1)].transpose(1, 2)


def write(stored: Tensor, x: Tensor, rows: Sequence[int], starts: Sequence[int]) -> None:
    """stored[row, :, start :] = x, for each of these rows."""
    count = x.shape[2]
    if len(rows) == len(stored) and len(set(starts)) == 1:
        stored[:, :, starts[0] : starts[0] + count] = x
        return
    index, places = _places(rows, starts, count, x.device)
    stored[index, :, places] = x.transpose(1, 2)


def _places(rows: Sequence[int], starts: Sequence[int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
    return torch.tensor(rows, device=device)[:, None], places
