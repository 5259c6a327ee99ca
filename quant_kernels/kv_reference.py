"""What attention over a quantized KV cache is, in plain torch: the reference of `kv_decode`, and its way on a CPU.

Tokens go by in chunks, each dequantized, multiplied and left behind: of a softmax over all of them, what was met so far
is enough (the largest logit, the sum of exponentials, and the values weighted with these, arXiv 1805.02867). So the
cache in full precision never exists, and memory does not grow with its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.arguments import FLOATS, expect
from quant_kernels.kv_planes import TOKENS, KVFormat, Planes, dequantize, format_of

CHUNK = 1 << 18
"""Numbers of keys, and of values, that are dequantized at a time: 1 MB, which stays in a cache."""


def kv_decode_reference(
    q: Tensor, k_codes: Tensor, k_scale: Tensor, k_minimum: Tensor | None, v_codes: Tensor, v_scale: Tensor,
    v_minimum: Tensor | None, lengths: Tensor, softmax_scale: float, k_recent: Tensor | None = None,
    v_recent: Tensor | None = None, recent_lengths: Tensor | None = None, block_table: Tensor | None = None,
    first: Tensor | None = None, num_sinks: int = 0, sliding_window: int | None = None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """In float32, rounded once at the end."""
    batch, _, queries, head_dim = q.shape
    keys, values = Planes(k_codes, k_scale, k_minimum), Planes(v_codes, v_scale, v_minimum)
    formats = check_cache(q, keys, values, lengths, k_recent, v_recent, recent_lengths, block_table, first)
    num_recent = torch.zeros_like(lengths) if recent_lengths is None else recent_lengths
    newest = (lengths + num_recent)[:, None] + torch.arange(-queries, 0, device=q.device)  # positions of queries
    oldest = torch.zeros_like(newest) if first is None else first[:, None].expand_as(newest)
    if sliding_window is not None:
        oldest = torch.maximum(oldest, newest - (sliding_window - 1))
    softmax = OnlineSoftmax(q.float().view(batch, k_codes.shape[1], -1, queries, head_dim) * softmax_scale, soft_cap)

    def attend(k: Tensor, v: Tensor, position: Tensor, stored: Tensor) -> None:
        """k, v: [batch, kv_heads, tokens, D]. position [batch, tokens], stored: whether there is such a token."""
        position = position[:, None]
        softmax.add(k, v, (position >= oldest[..., None]) & (position <= newest[..., None]) & stored[:, None])

    end = -(-int(lengths.max()) // TOKENS) * TOKENS if batch else 0
    step = max(1, CHUNK // max(1, batch * k_codes.shape[1] * head_dim * TOKENS)) * TOKENS
    begin = max(0, int(oldest.min()) - num_sinks) // step * step if end else 0
    for start in range(begin, end, step):
        k, v = (dequantize(_part(side, of, start, min(start + step, end), block_table), of)
                for side, of in zip((keys, values), formats, strict=True))  # fmt: skip
        token = torch.arange(start, start + k.shape[2], device=q.device)[None]
        attend(k, v, token + num_sinks, token < lengths[:, None])
    if k_recent is not None and v_recent is not None:
        slot = torch.arange(k_recent.shape[2], device=q.device)[None]
        position = torch.where(slot < num_sinks, slot, slot + lengths[:, None])
        attend(k_recent.float(), v_recent.float(), position, slot < num_recent[:, None])
    return softmax.result().view(q.shape).to(q.dtype)


class OnlineSoftmax:
    """softmax(q · kᵀ) · v of tokens that come in parts. q: float32 [batch, kv_heads, heads per kv_head, queries, D]."""

    def __init__(self, q: Tensor, soft_cap: float | None) -> None:
        self.q, self.soft_cap = q, soft_cap
        self.largest = q.new_full((*q.shape[:-1], 1), -torch.inf)
        self.weight = torch.zeros_like(self.largest)
        self.value = torch.zeros_like(q)

    def add(self, k: Tensor, v: Tensor, visible: Tensor) -> None:
        """k, v: [batch, kv_heads, tokens, D]. visible: [batch, queries, tokens]; others may be anything, even NaN."""
        rows = self.q.flatten(2, 3)
        logits = (rows @ k.transpose(2, 3)).view(*self.q.shape[:-1], -1)
        if self.soft_cap is not None:
            logits = self.soft_cap * (logits / self.soft_cap).tanh()
        if not visible.all():
            logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
            v = v.masked_fill(~visible.any(dim=1)[:, None, :, None], 0)
        largest = torch.maximum(self.largest, logits.amax(dim=-1, keepdim=True))
        finite = largest.masked_fill(largest == -torch.inf, 0)
        weights, kept = (logits - finite).exp_(), (self.largest - finite).exp_()
        self.largest = largest
        self.weight = self.weight * kept + weights.sum(dim=-1, keepdim=True)
        self.value = self.value * kept + (weights.flatten(2, 3) @ v).view_as(self.value)

    def result(self) -> Tensor:
        """Zeros where no token was visible. The largest logit alone has a weight of 1."""
        return self.value / self.weight.clamp_min(1)


def _part(planes: Planes, format: KVFormat, start: int, end: int, block_table: Tensor | None) -> Planes:
    """Tokens from `start` to `end` as [batch, kv_heads, tokens, …]. Both are multiples of 32."""
    block_tokens = planes.codes.shape[2]

    def part(stored: Tensor, shared: int = 1) -> Tensor:
        """shared: tokens of one entry."""
        if block_table is None:
            return stored[:, :, start // shared : end // shared]
        first = start // block_tokens
        blocks = block_table[:, first : -(-end // block_tokens)].clamp(0, len(stored) - 1)
        begin = (start - first * block_tokens) // shared
        return stored[blocks].transpose(1, 2).flatten(2, 3)[:, :, begin : begin + (end - start) // shared]

    if format.levels == "fp8":
        return planes._replace(codes=part(planes.codes))
    shared = TOKENS if format.per == "channel" else 1
    minimum = None if planes.minimum is None else part(planes.minimum, shared)
    return Planes(part(planes.codes), part(planes.scale, shared), minimum)


def check_cache(
    q: Tensor, keys: Planes, values: Planes, lengths: Tensor, k_recent: Tensor | None, v_recent: Tensor | None,
    recent_lengths: Tensor | None, block_table: Tensor | None, first: Tensor | None,
) -> tuple[KVFormat, KVFormat]:  # fmt: skip
    """The formats of keys and values. Raises ValueError where an argument of `kv_decode` is not as it has them."""
    expect("q", q, FLOATS, [None] * 4, keys.codes.device)
    (batch, heads, queries, head_dim), integers = q.shape, (torch.int32,)
    k_format, v_format = format_of("k", keys, head_dim), format_of("v", values, head_dim)
    sequences, kv_heads, tokens, _ = keys.codes.shape
    if v_format.per == "channel":
        raise ValueError("v_scale is per channel, which keys can have. Quantize values per token")
    if values.codes.shape[:3] != keys.codes.shape[:3]:
        raise ValueError(f"v_codes has shape {[*values.codes.shape]}, k_codes {[*keys.codes.shape]}. All but the last "
                         "length should be the same")  # fmt: skip
    if not queries or not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and {queries} queries, expected a multiple of the {kv_heads} heads of "
                         "keys and at least 1 query")  # fmt: skip
    if tokens % TOKENS:
        raise ValueError(f"k_codes has room for {tokens} tokens, expected a multiple of {TOKENS}. Make room for more")
    expect("lengths", lengths, integers, [batch], q.device)
    if block_table is not None:
        expect("block_table", block_table, integers, [batch, None], q.device)
    elif sequences != batch:
        raise ValueError(f"k_codes is of {sequences} sequences, q of {batch}. Blocks need a block_table")
    if first is not None:
        expect("first", first, integers, [batch], q.device)
    if (k_recent is None) != (v_recent is None) or (k_recent is None) != (recent_lengths is None):
        raise ValueError("k_recent, v_recent and recent_lengths are given in part. Give all three or none")
    if k_recent is not None and v_recent is not None and recent_lengths is not None:
        expect("k_recent", k_recent, (q.dtype,), [batch, kv_heads, None, head_dim], q.device)
        expect("v_recent", v_recent, (q.dtype,), k_recent.shape, q.device)
        expect("recent_lengths", recent_lengths, integers, [batch], q.device)
    return k_format, v_format
