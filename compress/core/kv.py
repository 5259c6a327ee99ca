"""Schemes of the KV cache: the grids that keys and values are rounded to, and the tokens that keep their precision.

A row of a grid is a token here and a column is a channel of one head. 8 bits have a scale for each token and head, and
a token is quantized when it comes; the scales of `fp8` are fixed by calibration, one a layer or one a head. Below 8
bits the newest tokens, a *window*, and the first few, *sinks* that much attention goes to whatever they say (arXiv
2309.17453), stay as they are, and the others leave the window in groups of 32. Keys have channels that are large in
every token, so 4 and 2 bits give each channel of a group of tokens a scale, while values have one for 32 channels of a
token: KIVI (arXiv 2402.02750). The `rotated` schemes turn keys and queries by the same orthogonal matrix instead, which
spreads those channels over all (QuaRot, arXiv 2404.00456): keys then have one scale per token, and a cache can be cut
at any token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.scheme import FP8_TENSOR, Grid

TOKENS = 32
"""Tokens that leave the window together."""
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class KVScheme:
    """How keys and values are kept. Raises ValueError for a window that groups of 32 tokens cannot leave."""

    keys: Grid
    values: Grid
    window: int = 0
    """Newest tokens that stay in full precision; there may be up to 31 more. 0: all are quantized as they come."""
    sinks: int = 0
    """First tokens that do."""
    rotated: bool = False
    """Whether keys and queries are turned by a Hadamard matrix, after the rotary embedding."""
    by_head: bool = False
    """Whether calibrated scales are of each head, not of all."""

    def __post_init__(self) -> None:
        if self.window < 0 or self.window % TOKENS or self.sinks < 0 or (self.sinks and not self.window):
            raise ValueError(f"window={self.window}, sinks={self.sinks}: a window is a multiple of {TOKENS}, and only "
                             "with one there are sinks")  # fmt: skip

    @property
    def name(self) -> str:
        """What a recipe calls it; where it has no name there, the bits of keys and values."""
        bits = f"k{self.keys.bits}v{self.values.bits}{'-rotated' if self.rotated else ''}"
        return next((name for name, scheme in KV_SCHEMES.items() if scheme == self), bits)

    @property
    def static(self) -> bool:
        """Whether calibration fixes the scales."""
        return self.keys.overall

    def check(self, head_dim: int) -> None:
        """Raise ValueError where heads of so many channels do not divide into groups and bytes."""
        multiple = self.values.group_size or 8
        if head_dim % multiple:
            coarse = [name for name, scheme in KV_SCHEMES.items() if not scheme.values.group_size]
            other = f", or choose {' or '.join(coarse)}" if head_dim % 8 == 0 else ""
            raise ValueError(f"head_dim={head_dim} is not a multiple of {multiple}, as scheme {self.name} needs. "
                             f"Leave the cache unquantized{other}")  # fmt: skip

    def num_quantized(self, tokens: int) -> int:
        """How many of a sequence's tokens are in few bits: all whole groups that leave a window behind."""
        if not self.window:
            return tokens
        return max(0, tokens - self.sinks - self.window) // TOKENS * TOKENS

    def token_bytes(self, head_dim: int, itemsize: int = 2) -> float:
        """Bytes of key and value of a quantized token in one head, with scales and minima of `itemsize` bytes."""
        self.check(head_dim)
        return sum(_token_bytes(grid, head_dim, itemsize) for grid in (self.keys, self.values))

    def num_bytes(self, tokens: int, head_dim: int, itemsize: int = 2) -> float:
        """Bytes of a sequence in one head, of a model whose floats have `itemsize`. Scales of fp8 are not counted."""
        quantized = self.num_quantized(tokens)
        return quantized * self.token_bytes(head_dim, itemsize) + (tokens - quantized) * 2 * head_dim * itemsize


def parse_kv_scheme(name: str) -> KVScheme:
    """The scheme a recipe names. Raises ValueError with the names that exist."""
    if name not in KV_SCHEMES:
        raise ValueError(f"unknown KV cache scheme {name!r}; there are {', '.join(KV_SCHEMES)}")
    return KV_SCHEMES[name]


def heads_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """The key-value heads of a layer, and the channels of one, from a config.json."""
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads


def rounded(x: Float[Tensor, "*any tokens channels"], grid: Grid) -> Float[Tensor, "*any tokens channels"]:
    """Keys or values as what their codes stand for; tokens that do not fill a group are left as they are.

    Of 8 bits, codes are symmetric, below that they count up from the least of their group. Scales, and minima, are
    rounded to the type of x before codes are found. The grid's scales follow the data.
    """
    tokens, exact = x.shape[-2], x.float()
    whole = tokens // (grid.rows or 1) * (grid.rows or 1)
    shared, dim = ((-1, grid.rows), -2) if grid.rows == TOKENS else ((-1, grid.group_size or x.shape[-1]), -1)
    value = exact[..., :whole, :].unflatten(dim, shared)
    low, high = value.aminmax(dim=dim, keepdim=True) if whole else (value, value)
    if grid.symmetric:
        offset, scale, least, most = torch.zeros_like(low), torch.maximum(-low, high) / 127, -127, 127
    else:
        most = (1 << grid.bits) - 1
        offset, scale, least = low.to(x.dtype).float(), (high - low) / most, 0
    scale = scale.to(x.dtype).float()
    codes = ((value - offset) / scale.masked_fill(scale == 0, torch.inf)).round().clamp(least, most)
    exact[..., :whole, :] = (codes * scale + offset).flatten(dim - 1, dim)
    return exact.to(x.dtype)


def static_scale(largest: Float[Tensor, " kv_heads"], by_head: bool) -> Float[Tensor, " scales"]:
    """The scale of a calibrated fp8 cache: the largest magnitude, of each head or of all, comes to be the largest
    number that there is. Of nothing but zeros it is 1."""
    largest = largest if by_head else largest.amax().view(1)
    return torch.where(largest > 0, largest / LARGEST_FP8, 1.0)


def _token_bytes(grid: Grid, head_dim: int, itemsize: int) -> float:
    codes = head_dim * grid.bits / 8
    if grid.rows is None:
        return codes
    return codes + grid.num_groups(head_dim) * (1 if grid.symmetric else 2) * itemsize / grid.rows


def _low_bits(keys: Grid, values: int, *, rotated: bool = False) -> KVScheme:
    return KVScheme(keys, Grid(values, symmetric=False, group_size=32), window=128, sinks=4, rotated=rotated)


def _per_channel(bits: int) -> Grid:
    return Grid(bits, symmetric=False, group_size=1, rows=TOKENS)


KV_SCHEMES = {
    "fp8": KVScheme(FP8_TENSOR, FP8_TENSOR),
    "fp8-head": KVScheme(FP8_TENSOR, FP8_TENSOR, by_head=True),
    "kv8": KVScheme(Grid(8), Grid(8)),
    "k8v4": _low_bits(Grid(8), 4),
    "kv4": _low_bits(_per_channel(4), 4),
    "kv4-rotated": _low_bits(Grid(4, symmetric=False), 4, rotated=True),
    "kv2": _low_bits(_per_channel(2), 2),
    "kv2-rotated": _low_bits(Grid(2, symmetric=False), 2, rotated=True),
}
