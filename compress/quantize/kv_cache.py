"""Quantization of the KV cache: what a model remembers while it runs, in few bits. Weights stay as they are.

The scheme (`compress.core.kv`) is written into config.json, where `compress.load` finds it. Where scales follow the
data there is nothing to calibrate, and other readers pass it over. The scales of `fp8` are fixed here, from the largest
key and value that the block computes by now, and serving engines read them. What it costs shows only where the past is
read from the cache, so a run with this stage is scored on the decode path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.calibrate.cached import largest_cached
from compress.core.kv import KVScheme, heads_of, parse_kv_scheme, static_scale
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


@dataclass(frozen=True)
class KVCache:
    """The stage `kv_cache`."""

    name: ClassVar[str] = "kv_cache"
    role: ClassVar[Role] = "cache"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    scheme: str

    def __post_init__(self) -> None:
        parse_kv_scheme(self.scheme)

    @property
    def calibrated(self) -> bool:
        """Whether its scales are fixed here."""
        return self.resolved.static

    @property
    def resolved(self) -> KVScheme:
        return parse_kv_scheme(self.scheme)

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any]) -> list[str]:
        """Why the cache of this model cannot be kept so, a sentence each."""
        if anatomy.head is None:
            return [f"the {anatomy.family} model ends without a head: it does not generate, and has no cache"]
        try:
            self.resolved.check(heads_of(config)[1])
        except ValueError as error:
            return [str(error)]
        return []

    def summary(self, config: Mapping[str, Any], num_blocks: int) -> str:
        """What it does to the memory of a token, in words."""
        kv_heads, head_dim = heads_of(config)
        before, after = 4 * head_dim, self.resolved.token_bytes(head_dim)
        heads, window = kv_heads * num_blocks, self.resolved.window
        kept = f"; the newest {window} tokens and the first {self.resolved.sinks} stay as they are" if window else ""
        return f"keys and values take {heads * after:,.0f} bytes a token, not {heads * before:,}{kept}"

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Fix the scales of a block's keys and values, where the scheme has such."""
        if self.resolved.static:
            keys, values = (static_scale(largest, self.resolved.by_head) for largest in largest_cached(block))
            block.cache_scales = keys, values
        return []
