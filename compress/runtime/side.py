"""The tensors of one side of a cache layer, of keys or of values, and what is done to rows of them.

*Slots* hold tokens as they are, *planes* in few bits (`quant_kernels.kv_planes`). Both are allocated with room for
more. How many tokens of each sequence are in them is the layer's business (`compress.runtime.cache`), which says where
to write, row by row, for sequences of a batch may have different numbers. Where in the planes a sequence lies, and how
large they are, is that of the layer's storage (`compress.runtime.storage`): here it is a table of blocks, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.core.kv import TOKENS
from compress.core.scheme import Grid
from quant_kernels.kv_cache import append, runs_kernels
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
        self.static_scale: Tensor | None = None
        if self.format.levels == "fp8":
            scale = torch.ones(x.shape[1]) if scale is None else scale
            self.static_scale = scale.to(x.device, torch.float32).contiguous()
        self.planes = self._planes(0, 0)

    @property
    def num_slots(self) -> int:
        return self.slots.shape[2]

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.planes.nbytes

    def room_nbytes(self, num_recent: int, num_stored: int) -> int:
        """Bytes that are allocated beyond so many tokens in slots and in planes, of all sequences together."""
        codes = self.planes.codes
        used = [(self.slots, len(self.slots) * self.num_slots, num_recent)]
        used += [(part, len(codes) * codes.shape[2], num_stored) for _, part, _ in self.parts()]
        return sum(part.nbytes - part.nbytes * count // room for part, room, count in used if room)

    def keep(self, x: Tensor, starts: Sequence[int]) -> None:
        """Put tokens x [batch, kv_heads, tokens, D] into slots."""
        write(self.slots, x, starts)

    def quantize(self, x: Tensor, starts: Sequence[int], table: Tensor | None) -> None:
        """Put tokens x [rows, kv_heads, tokens, D] into the planes, as `write` does."""
        if runs_kernels(x):
            append(x, self.planes, torch.tensor(starts, dtype=torch.int32).to(x.device, non_blocking=True), table)
            return
        new = self._quantized(x)
        for (_, stored, shared), (_, part, _) in zip(self.parts(), self.parts(new), strict=True):
            write(stored, part, [start // shared for start in starts], table)

    def rounded(self, x: Tensor) -> Tensor:
        """Tokens x [rows, kv_heads, tokens, D] as what their codes stand for."""
        return dequantize(self._quantized(x), self.format).to(x.dtype)

    def remove_slots(self, rows: Sequence[int], start: int, count: int) -> None:
        """Move up what comes after so many slots."""
        index = slice(None) if len(rows) == len(self.slots) else [*rows]
        self.slots[index, :, start:-count] = self.slots[index, :, start + count :].clone()

    def restore(self, row: int, table: Tensor | None, start: int, count: int, slot: int) -> None:
        """Put so many quantized tokens into slots, as what their codes stand for. `start`: where a group begins.
        `table`: of this row."""
        groups = -(-count // self.group) * self.group
        parts = {name: read(part, start // shared, groups // shared, table) for name, part, shared in self.parts()}
        tokens = dequantize(self.planes._replace(**parts), self.format)
        self.slots[row, :, slot : slot + count] = tokens[0, :, :count]

    def resize_slots(self, num_slots: int) -> None:
        old, kept = self.slots, min(num_slots, self.num_slots)
        self.slots = old.new_zeros(*old.shape[:2], num_slots, old.shape[3])
        self.slots[:, :, :kept] = old[:, :, :kept]

    def select_slots(self, rows: Tensor) -> None:
        """Keep those of these rows, in this order."""
        self.slots = self.slots.index_select(0, rows)

    def new_planes(self, sequences: int, tokens: int) -> list[tuple[Tensor, Tensor, int]]:
        """Begin planes of another size, with nothing in them. What comes back, to be copied: each part of the old ones,
        what takes its place, and how many tokens share an entry."""
        old = self.parts()
        self.planes = self._planes(sequences, tokens)
        return [(part, new, shared) for (_, part, shared), (_, new, _) in zip(old, self.parts(), strict=True)]

    def parts(self, planes: Planes | None = None) -> list[tuple[str, Tensor, int]]:
        """What there is of each sequence, by default in its own planes: its name, the tensor, and how many tokens share
        an entry."""
        codes, scale, minimum = planes or self.planes
        found = [("codes", codes, 1)]
        if self.static_scale is None:
            found.append(("scale", scale, self.group))
        if minimum is not None:
            found.append(("minimum", minimum, self.group))
        return found

    def _quantized(self, x: Tensor) -> Planes:
        return quantize(x, self.format, self.slots.dtype, self.static_scale)

    def _planes(self, sequences: int, tokens: int) -> Planes:
        _, kv_heads, _, head_dim = self.slots.shape
        new = self.format.new(sequences, kv_heads, tokens, head_dim, self.slots.dtype, self.slots.device)
        return new if self.static_scale is None else new._replace(scale=self.static_scale)


def kv_format(grid: Grid) -> KVFormat:
    """A grid of keys or values as kernels know it."""
    if grid.rows == TOKENS:
        return KVFormat(grid.bits, "channel")
    return KVFormat(grid.bits, "token", grid.group_size, "fp8" if grid.kind == "float" else "int")


def taken(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """x[row, :, start : start + count] of each row; before the first entry and beyond the last one, these again."""
    if len(set(starts)) == 1 and 0 <= starts[0] <= x.shape[2] - count:
        return x[:, :, starts[0] : starts[0] + count]
    row = torch.arange(len(x), device=x.device)[:, None]
    return x[row, :, _places(starts, count, x.device).clamp(0, x.shape[2] - 1)].transpose(1, 2)


def write(stored: Tensor, x: Tensor, starts: Sequence[int], table: Tensor | None = None) -> None:
    """Put x [rows, kv_heads, count, …] where each row begins; what would come before 0 is left out.

    `table`, int [rows, blocks]: which entries of `stored` a row is made of; None: row by row.
    """
    count, room = x.shape[2], stored.shape[2]
    if table is None and len(set(starts)) == 1:
        stored[:, :, starts[0] : starts[0] + count] = x
        return
    place = _places(starts, count, x.device)
    row, token = (place >= 0).nonzero(as_tuple=True)
    place = place[row, token]
    stored[_blocks(table, row, place, room), :, place % room] = x[row, :, token]


def read(stored: Tensor, start: int, count: int, table: Tensor | None) -> Tensor:
    """So many entries of the first row that `table` has, [1, kv_heads, count, …]."""
    place, room = torch.arange(start, start + count, device=stored.device), stored.shape[2]
    return stored[_blocks(table, torch.zeros_like(place), place, room), :, place % room].transpose(0, 1)[None]


def _places(starts: Sequence[int], count: int, device: torch.device) -> Tensor:
    """[rows, count]."""
    return torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)


def _blocks(table: Tensor | None, row: Tensor, place: Tensor, room: int) -> Tensor:
    """In which entries of what is stored these places of these rows are."""
    return row if table is None else table[row, place // room]
