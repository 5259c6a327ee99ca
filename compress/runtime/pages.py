"""Quantized tokens in blocks of a fixed number, which sequences take as they grow: PagedAttention (arXiv 2309.06180).

A sequence has the blocks that its own length needs, wherever they lie, and a table says which. So a batch of unequal
lengths takes the room of all its tokens and not of the longest for each, nothing moves when a sequence grows, and what
a sliding layer forgets is free for others. Sequences that were one, beams or several answers to a prompt, share its
blocks: such a block is copied before one of them writes to it, and free when none has it.

The pool of blocks grows by a quarter, so that few steps copy it, and does not shrink before the cache is reset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.runtime.side import Side
from compress.runtime.storage import Storage


class Pages(Storage):
    """Planes [blocks, kv_heads, block_tokens, …], and the blocks of each sequence."""

    block_table: Tensor

    def __init__(self, sides: Sequence[Side], batch: int, block_tokens: int) -> None:
        self.sides, self.unit = sides, block_tokens
        for side in sides:
            side.new_planes(0, block_tokens)
        self.blocks: list[list[int]] = [[] for _ in range(batch)]
        """By sequence, in the order of its tokens."""
        self.free: list[int] = []
        self.num_users: list[int] = []
        """By block: how many sequences have it."""
        self._tabulate()

    def table(self, rows: Sequence[int]) -> Tensor:
        return self.block_table if len(rows) == len(self.blocks) else self.block_table[[*rows]]

    def fits(self, lengths: Sequence[int], ends: Sequence[int]) -> bool:
        return not self._missing(lengths, ends)

    def make_room(self, dropped: Sequence[int], lengths: Sequence[int], ends: Sequence[int]) -> None:
        for blocks, count in zip(self.blocks, dropped, strict=True):
            self._release(blocks, 0, count // self.unit)
        missing = self._missing(lengths, ends)
        self._have_free(len(missing))
        shared, copies = [], []
        for row, i in missing:
            blocks, new = self.blocks[row], self.free.pop()
            if i < len(blocks):
                shared.append(blocks[i])
                copies.append(new)
            self._release(blocks, i, i + 1)
            blocks.insert(i, new)
            self.num_users[new] = 1
        if copies:
            for part in self._parts():
                part[copies] = part[shared]
        self._tabulate()

    def shorten(self, lengths: Sequence[int]) -> None:
        for blocks, length in zip(self.blocks, lengths, strict=True):
            self._release(blocks, self._num_blocks(length), len(blocks))
        self._tabulate()

    def select(self, rows: Sequence[int]) -> None:
        before, self.blocks = self.blocks, [[*self.blocks[row]] for row in rows]
        for block in (block for blocks in self.blocks for block in blocks):
            self.num_users[block] += 1
        for blocks in before:
            self._release(blocks, 0, len(blocks))
        self._tabulate()

    def num_stored(self, lengths: Sequence[int]) -> int:
        num_tokens = [0] * len(self.num_users)
        for blocks, length in zip(self.blocks, lengths, strict=True):
            for i, block in enumerate(blocks):
                num_tokens[block] = max(num_tokens[block], min(length - i * self.unit, self.unit))
        return sum(num_tokens)

    def _missing(self, lengths: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
        """The sequence, and which one of its blocks, where tokens from `lengths` to `ends` go to a block that it does
        not have, or shares."""
        return [
            (row, i)
            for row, (start, end, blocks) in enumerate(zip(lengths, ends, self.blocks, strict=True))
            for i in range(max(start, 0) // self.unit, self._num_blocks(end) if start < end else 0)
            if i >= len(blocks) or self.num_users[blocks[i]] > 1
        ]

    def _have_free(self, count: int) -> None:
        """Enlarge the pool where there are not so many."""
        size, needed = len(self.num_users), len(self.num_users) - len(self.free) + count
        if needed <= size:
            return
        larger = needed + -(-needed // 4)
        for side in self.sides:
            for old, new, _ in side.new_planes(larger, self.unit):
                new[:size] = old
        self.free += reversed(range(size, larger))
        self.num_users += [0] * (larger - size)

    def _release(self, blocks: list[int], start: int, end: int) -> None:
        """Take these out of the blocks of a sequence."""
        for block in blocks[start:end]:
            self.num_users[block] -= 1
            if not self.num_users[block]:
                self.free.append(block)
        del blocks[start:end]

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.unit)

    def _parts(self) -> list[Tensor]:
        return [part for side in self.sides for _, part, _ in side.parts()]

    def _tabulate(self) -> None:
        """The table of all; where a sequence has no more blocks, it says 0."""
        most = max(map(len, self.blocks), default=0)
        table = [blocks + [0] * (most - len(blocks)) for blocks in self.blocks]
        table_on_host = torch.tensor(table, dtype=torch.int32).view(len(table), most)
        self.block_table = table_on_host.to(self.sides[0].slots.device, non_blocking=True)
