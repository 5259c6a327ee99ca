"""Where the quantized tokens of a layer lie: how large its planes are, and which part of them each sequence has.

A storage knows places only; what is there, and how many tokens of each sequence, is for the layer to say
(`compress.runtime.cache`). Keys and values have the same places. There are two: `Contiguous` here, where each sequence
has a row with room for as many tokens as the longest, and `Pages` (`compress.runtime.pages`), where each takes blocks
as it needs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.core.kv import TOKENS
from compress.runtime.side import Side, taken

LEAST_ROOM, MOST_ROOM = 64, 1024
"""Tokens that a tensor which grows has room for beyond those it needs."""


class Storage(ABC):
    """Of planes of keys and of values. Lists of numbers have one for each sequence."""

    unit: int
    """Tokens that can be forgotten: a multiple of so many."""
    block_table: Tensor | None
    """int32 [batch, most blocks of a sequence]; None: sequence i is row i of the planes."""

    @abstractmethod
    def table(self, rows: Sequence[int]) -> Tensor | None:
        """The block table of these sequences, in ascending order; int32 [rows, blocks], None where it is all rows."""

    @abstractmethod
    def fits(self, lengths: Sequence[int], ends: Sequence[int]) -> bool:
        """Whether tokens from `lengths` to `ends` can be written."""

    @abstractmethod
    def make_room(self, dropped: Sequence[int], lengths: Sequence[int], ends: Sequence[int]) -> None:
        """Forget the oldest tokens, so many that `lengths` are left, and let `ends` fit."""

    @abstractmethod
    def shorten(self, lengths: Sequence[int]) -> None:
        """No more than so many tokens are needed."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order; one may be there several times."""

    @abstractmethod
    def num_stored(self, lengths: Sequence[int]) -> int:
        """Tokens that are there when sequences have so many; what they share is there once."""

    @property
    def nbytes(self) -> int:
        """Bytes beside the planes."""
        return 0 if self.block_table is None else self.block_table.nbytes


class Contiguous(Storage):
    """Each sequence in a row, with room for the longest. To grow, or to forget, all are copied."""

    unit = TOKENS
    block_table = None

    def __init__(self, sides: Sequence[Side], batch: int) -> None:
        self.sides, self.batch, self.capacity = sides, batch, 0
        for side in sides:
            side.new_planes(batch, 0)

    def table(self, rows: Sequence[int]) -> Tensor | None:
        if len(rows) == self.batch:
            return None
        return torch.tensor(rows, dtype=torch.int32, device=self.sides[0].slots.device)[:, None]

    def fits(self, lengths: Sequence[int], ends: Sequence[int]) -> bool:
        return max(ends) <= self.capacity

    def make_room(self, dropped: Sequence[int], lengths: Sequence[int], ends: Sequence[int]) -> None:
        self.capacity = with_room(max(ends))
        for side in self.sides:
            for old, new, shared in side.new_planes(self.batch, self.capacity):
                kept = -(-max(lengths) // shared)
                new[:, :, :kept] = taken(old, [count // shared for count in dropped], kept)

    def shorten(self, lengths: Sequence[int]) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        self.batch = len(rows)
        for side in self.sides:
            index = torch.tensor(rows, device=side.slots.device)
            for old, new, _ in side.new_planes(self.batch, self.capacity):
                torch.index_select(old, 0, index, out=new)

    def num_stored(self, lengths: Sequence[int]) -> int:
        return sum(lengths)


def with_room(tokens: int) -> int:
    """At least so many, in whole groups."""
    room = tokens + min(max(tokens // 4, LEAST_ROOM), MOST_ROOM)
    return -(-room // TOKENS) * TOKENS
