"""A transformers `Cache` whose keys and values lie packed, in the bits of a `KVScheme`.

A layer of it holds, of each sequence, the first few tokens and a window of the newest as they are, in slots, and all
between in few bits, which attention reads as they are (`compress.runtime.attention`). Nothing is ever expanded.

- The first prompt sees itself in full precision and is packed after its attention. A later token sees the cache as it
  is then: before tokens are added, what the window has outgrown leaves it, in groups of 32. Of tokens that come
  together, each sees what it would if it came alone: groups that would have left before it are rounded for it. So it
  makes no difference in which steps tokens come, drafted, in chunks, or one by one; only what is drafted together with
  the first prompt sees it as it sees itself.
- Sequences of a batch lie left-aligned, without the padding of their prompts. Each has its own lengths, its own sinks
  and groups, and so is quantized as it would be alone.
- `crop` shortens. Codes that stay do not change. Where keys have scales per channel and the cut goes through a group of
  32, the rest of the group returns to the window as what it had become, and is quantized again when it leaves.
- Sliding layers forget groups that no query will see, when they need room. While the past is recorded, for speculative
  decoding, they forget, and windows lose, only what was there at the last `crop`; a first prompt, which may end in
  guesses, leaves a group of 32 to the next one.

Where in the planes a sequence lies is for a `Storage` to say: in a row of its own, or in blocks. What it has becomes
what it would be in the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from compress.core.hadamard import factors, kronecker
from compress.core.kv import TOKENS, KVScheme
from compress.errors import RequestError
from compress.runtime.pages import Pages
from compress.runtime.side import Side, taken
from compress.runtime.storage import Contiguous, Storage, with_room


class View(NamedTuple):
    """What some of the newest tokens see of a layer."""

    start: int
    end: int
    """Which of them, in order."""
    quantized: list[int]
    recent: list[int]
    """By sequence: tokens in planes and in slots, up to the last of these."""
    slots: list[Tensor]
    """Of keys and of values."""


class PackedLayer(DynamicLayer):
    """Keys and values of one attention layer.

    `sliding_window`: tokens that a query sees, itself included; None: all. `scales`: of keys and of values, float
    [kv_heads], for fp8; None: 1. `block_tokens`: of a block, a multiple of 32; None: storage is contiguous.
    """

    def __init__(
        self, scheme: KVScheme, sliding_window: int | None = None, scales: tuple[Tensor, Tensor] | None = None,
        block_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scheme = scheme
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.scales = scales
        self.block_tokens = block_tokens
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.length = 0
        """Tokens of a sequence and its padding: columns of an attention mask."""
        self.prompt: tuple[Tensor, Tensor] | None = None
        """Keys and values of the first prompt, between `update` and `pack`."""
        self.sides: tuple[Side, ...] = ()
        """Keys, values; sinks are in the first slots."""
        self.storage: Storage = Contiguous((), 0)
        """Where in the planes of both a sequence lies."""
        self.padding: list[int] = []
        self.num_dropped: list[int] = []
        self.num_quantized: list[int] = []
        self.num_recent: list[int] = []
        """By sequence: columns of padding, tokens that were forgotten, tokens in planes, and in slots."""
        self._settled = 0
        """Columns that no `crop` is expected to remove."""

    def activate_past_recording(self) -> None:
        """From now on a `crop` may follow every update."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape != value_states.shape:
            raise RequestError(f"keys are {[*key_states.shape]}, values {[*value_states.shape]}: a quantized cache has "
                               "keys and values of one size. Leave the cache of this model unquantized")  # fmt: skip
        try:
            self.scheme.check(key_states.shape[3])
        except ValueError as error:
            raise RequestError(str(error)) from error
        k_scale, v_scale = self.scales or (None, None)
        self.sides = Side(key_states, self.scheme.keys, k_scale), Side(value_states, self.scheme.values, v_scale)
        batch, unit = len(key_states), self.block_tokens
        self.storage = Contiguous(self.sides, batch) if unit is None else Pages(self.sides, batch, unit)
        self.padding, self.num_dropped, self.num_quantized, self.num_recent = ([0] * batch for _ in range(4))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedLayer, PackedLayer]:
        """Add tokens [batch, kv_heads, tokens, D]. What comes back in the place of keys and values is the layer."""
        self._pack_unattended()
        if not self.length:
            self.lazy_initialization(key_states, value_states)
            self.prompt = key_states, value_states
        else:
            self._append(self._turned(key_states, value_states))
        self.length += key_states.shape[2]
        return self, self

    def pack(self, padding: Sequence[int]) -> None:
        """Quantize the first prompt, of whose sequences the first so many columns are padding."""
        assert self.prompt is not None
        states, self.prompt = self._turned(*self.prompt), None
        margin = TOKENS if self.record_past else 0
        self._settled = self.length - margin
        self.padding = list(padding)
        lengths = [self.length - columns for columns in padding]
        settled = [max(length - margin, 0) if self.scheme.window else length for length in lengths]
        self.num_quantized = [self.scheme.num_quantized(length) for length in settled]
        self.num_recent = differences(lengths, self.num_quantized)
        self.num_dropped = self._out_of_view()
        packed = differences(self.num_quantized, self.num_dropped)
        first, most = [columns + self.scheme.sinks for columns in padding], max(packed)
        end = sums(first, self.num_quantized)
        slots, sinks = max(self.num_recent), min(self.scheme.sinks, max(self.num_recent))
        self.num_quantized = [count - most for count in packed]  # what comes before token 0 is left out
        self._quantize([taken(x, [at - most for at in end], most) for x in states], range(len(padding)), most)
        self._make_slots(slots)
        for side, x in zip(self.sides, states, strict=True):
            side.slots[:, :, :sinks] = taken(x, padding, sinks)
            side.slots[:, :, sinks:slots] = taken(x, end, slots - sinks)

    def views(self, num_queries: int, most: int) -> Iterator[View]:
        """The newest tokens in turn, at most so many at a time, with what they see."""
        slots, gone, end = [side.slots for side in self.sides], [0] * len(self.padding), 0
        while end < num_queries:
            start, left = end, self._outgrown(num_queries - end)
            while end < min(num_queries, start + most) and self._outgrown(num_queries - end) == left:
                end += 1
            if left != gone:
                slots = [self._with_rounded(*each, gone, left) for each in zip(self.sides, slots, strict=True)]
                gone = left
            counts = self.num_recent if self.scheme.window else self.num_quantized
            seen = [count - (num_queries - end) for count in counts]
            yield View(start, end, self.num_quantized if self.scheme.window else seen, seen, slots)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, their number given as a negative one. Raises RequestError where a sliding layer
        has forgotten tokens that are needed again."""
        if tokens_to_remove > 0:
            raise RequestError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one")
        self._pack_unattended()
        removed = min(-tokens_to_remove, self.length)
        if removed == self.length:
            self.reset()
            return
        self._check_past(removed)
        self.length -= removed
        for row, columns in enumerate(self.padding):
            self._cut(row, removed)
            self.padding[row] = min(columns, self.length)
        self.storage.shorten(self.num_quantized)
        self._settled = self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; one may be there several times."""
        self._pack_unattended()
        if not self.is_initialized:
            return
        order = indices.tolist()
        for side in self.sides:
            side.select_slots(indices.to(side.slots.device))
        self.storage.select(order)
        for counts in (self.padding, self.num_dropped, self.num_quantized, self.num_recent):
            counts[:] = [counts[row] for row in order]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the past of the one that it goes on from."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make so many sequences of each one."""
        self.batch_select_indices(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, the first one) of a mask for so many new tokens."""
        first = 0 if self.sliding_window is None else max(0, self.length - self.sliding_window + 1)
        return self.length - first + query_length, first

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, with the room that is left in them."""
        return sum(tensors.nbytes for tensors in (self.storage, *self.sides, *(self.prompt or ())))

    @property
    def room_nbytes(self) -> int:
        """The part of `nbytes` that no token takes."""
        num_stored = self.storage.num_stored(self.num_quantized)
        return sum(side.room_nbytes(sum(self.num_recent), num_stored) for side in self.sides)

    def _turned(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return turned(keys) if self.scheme.rotated else keys, values

    def _pack_unattended(self) -> None:
        if self.prompt is not None:
            self.pack([0] * len(self.padding))

    def _append(self, states: tuple[Tensor, Tensor]) -> None:
        rows, num_new = range(len(self.padding)), states[0].shape[2]
        if not self.record_past:
            self._settled = self.length
        if not self.scheme.window:
            self._quantize(states, rows, num_new)
            return
        self._shrink_window()
        self._make_slots(max(self.num_recent) + num_new)
        for side, x in zip(self.sides, states, strict=True):
            side.keep(x, self.num_recent)
        self.num_recent = [slots + num_new for slots in self.num_recent]

    def _shrink_window(self) -> None:
        """Quantize what the window has outgrown."""
        leaving, sinks = self._outgrown(self.length - self._settled), self.scheme.sinks
        for count in sorted(set(leaving) - {0}):
            rows = [row for row, each in enumerate(leaving) if each == count]
            self._quantize([side.slots[rows, :, sinks : sinks + count] for side in self.sides], rows, count)
            for side in self.sides:
                side.remove_slots(rows, sinks, count)
            for row in rows:
                self.num_recent[row] -= count

    def _outgrown(self, newest: int) -> list[int]:
        """How many tokens of each sequence had to leave its window before the newest ones came."""
        if not self.scheme.window:
            return [0] * len(self.num_recent)
        return [self.scheme.num_quantized(max(slots - newest, 0)) for slots in self.num_recent]

    def _with_rounded(self, side: Side, slots: Tensor, gone: list[int], left: list[int]) -> Tensor:
        """Slots in which those that `left` is more than `gone` have become what their codes stand for."""
        slots, sinks, pairs = slots.clone(), self.scheme.sinks, [*zip(gone, left, strict=True)]
        for pair in sorted(set(pairs)):
            begin, end = (sinks + count for count in pair)
            rows = [row for row, each in enumerate(pairs) if each == pair and begin < end]
            if rows:
                slots[rows, :, begin:end] = side.rounded(slots[rows, :, begin:end])
        return slots

    def _quantize(self, states: Sequence[Tensor], rows: Sequence[int], count: int) -> None:
        """Add so many tokens [rows, kv_heads, count, D] to the quantized ones of these sequences."""
        self._make_room(rows, count)
        starts, table = [self.num_quantized[row] for row in rows], self.storage.table(rows)
        for side, x in zip(self.sides, states, strict=True):
            side.quantize(x, starts, table)
        for row in rows:
            self.num_quantized[row] += count

    def _make_room(self, rows: Sequence[int], count: int) -> None:
        """For so many more quantized tokens of these sequences."""
        new = [count if row in rows else 0 for row in range(len(self.padding))]
        if self.storage.fits(self.num_quantized, sums(self.num_quantized, new)):
            return
        dropped = self._out_of_view()
        self.num_dropped = sums(self.num_dropped, dropped)
        self.num_quantized = differences(self.num_quantized, dropped)
        self.storage.make_room(dropped, self.num_quantized, sums(self.num_quantized, new))

    def _make_slots(self, needed: int) -> None:
        """For so many tokens; what a long run of new ones took is given back."""
        usual = self.scheme.sinks + self.scheme.window + TOKENS
        if not needed <= self.sides[0].num_slots <= max(needed, usual) + 2 * TOKENS:
            for side in self.sides:
                side.resize_slots(max(needed, min(usual, with_room(needed))))

    def _out_of_view(self) -> list[int]:
        """Oldest quantized tokens that no query after the settled ones sees, as the storage can forget them."""
        if self.sliding_window is None:
            return [0] * len(self.padding)
        others = self.scheme.sinks + self.length - self._settled + self.sliding_window - 1
        stored, unit = zip(self.num_quantized, self.num_recent, strict=True), self.storage.unit
        return [max(0, min(quantized, quantized + slots - others)) // unit * unit for quantized, slots in stored]

    def _check_past(self, removed: int) -> None:
        """Raise RequestError unless all that the next query sees will be there."""
        counts = zip(self.num_quantized, self.num_recent, self.num_dropped, strict=True)
        stored = [quantized + slots for quantized, slots, dropped in counts if dropped]
        if self.sliding_window is None or not stored:
            return
        most = max(0, min(stored) - self.scheme.sinks - self.sliding_window + 1)
        if removed > most:
            raise RequestError(f"crop({-removed}): a layer with a sliding window of {self.sliding_window} tokens has "
                               f"forgotten those before it, and no more than {most} can be removed. Call "
                               "activate_past_recording() before adding what may be cropped")  # fmt: skip

    def _cut(self, row: int, removed: int) -> None:
        """Remove so many tokens of one sequence, or all it has."""
        sinks, quantized, slots = self.scheme.sinks, self.num_quantized[row], self.num_recent[row]
        if not quantized or removed <= slots - sinks:
            self.num_recent[row] = max(0, slots - removed)
            return
        left = quantized + slots - sinks - removed
        group = max(side.group for side in self.sides)
        self.num_quantized[row] = whole = max(0, left) // group * group
        self.num_recent[row] = max(0, sinks + left - whole)
        if left > whole:
            for side in self.sides:
                side.restore(row, self.storage.table([row]), whole, left - whole, sinks)


class QuantizedCache(Cache):
    """The cache of a model, with a `PackedLayer` for each layer of full or sliding attention.

    Layers of other kinds, of linear attention for instance, are as transformers has them. `scheme`: of all layers, or a
    sequence with that of each. `scales`: number of a layer → its calibrated scales of keys and of values [kv_heads],
    for fp8. `block_tokens`: of a block, a multiple of 32; None: storage is contiguous. Raises RequestError where it is
    none, and where no layer has keys and values of its own.
    """

    def __init__(
        self, config: Any, scheme: KVScheme | Sequence[KVScheme],
        scales: Mapping[int, tuple[Tensor, Tensor]] | None = None, block_tokens: int | None = None,
    ) -> None:  # fmt: skip
        if block_tokens is not None and (block_tokens < TOKENS or block_tokens % TOKENS):
            raise RequestError(f"block_tokens={block_tokens}: blocks have a multiple of {TOKENS} tokens, 64 for "
                               "instance; None is for contiguous storage")  # fmt: skip
        text = config.get_text_config(decoder=True)
        if "reuse" in (getattr(text, "kv_sharing_modes", None) or ()) or getattr(text, "num_kv_shared_layers", None):
            raise RequestError(f"model_type={text.model_type!r}: layers read keys and values of others, which is not "
                               "possible with a quantized cache. Leave it unquantized")  # fmt: skip
        layers = DynamicCache(config=text).layers
        schemes = [scheme] * len(layers) if isinstance(scheme, KVScheme) else scheme
        if len(schemes) != len(layers):
            raise RequestError(
                f"scheme: {len(schemes)} schemes for {len(layers)} layers. Give one for each, or for all"
            )
        for index, kind in enumerate(_kinds(text)):
            sliding_window = getattr(layers[index], "sliding_window", None)
            if type(layers[index]) in (DynamicLayer, DynamicSlidingWindowLayer) and kind != "chunked_attention":
                layers[index] = PackedLayer(schemes[index], sliding_window, (scales or {}).get(index), block_tokens)
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            raise RequestError(f"model_type={text.model_type!r}: no layer has full or sliding attention, so there is "
                               "nothing to quantize. Leave the cache unquantized")  # fmt: skip
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in packed layers, with the room that is left in them."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PackedLayer))

    @property
    def room_nbytes(self) -> int:
        """The part of `nbytes` that no token takes."""
        return sum(layer.room_nbytes for layer in self.layers if isinstance(layer, PackedLayer))


def turned(x: Tensor) -> Tensor:
    """Keys or queries [..., D], each times the orthogonal matrix of the rotated schemes."""
    return kronecker(x.float(), factors(x.shape[-1])).to(x.dtype)


def sums(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


def differences(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _kinds(config: Any) -> Sequence[str]:
    """What kind of attention each layer has."""
    chunked = getattr(config, "attention_chunk_size", None) is not None
    kind = "chunked_attention" if chunked else "full_attention"
    return getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
