"""Quantization of the KV cache: what a model remembers while it runs, in few bits. Weights stay as they are.

The scheme (`compress.core.kv`) is written into config.json, where `compress.load` finds it and other readers pass over
it. Scales follow the data, so there is nothing to calibrate. What it costs shows only where the past is read from the
cache, so a run with this stage is scored on the decode path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.core.kv import KVScheme, parse_kv_scheme
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
    calibrated: ClassVar[bool] = False
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    scheme: str

    def __post_init__(self) -> None:
        if self.resolved.static:
            raise ValueError(f"scheme {self.scheme} has fixed scales, which no stage calibrates yet. Use kv8")

    @property
    def resolved(self) -> KVScheme:
        return parse_kv_scheme(self.scheme)

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any]) -> list[str]:
        """Why the cache of this model cannot be kept so, a sentence each."""
        if anatomy.head is None:
            return [f"the {anatomy.family} model ends without a head: it does not generate, and has no cache"]
        try:
            self.resolved.check(_heads(config)[1])
        except ValueError as error:
            return [str(error)]
        return []

    def summary(self, config: Mapping[str, Any], num_blocks: int) -> str:
        """What it does to the memory of a token, in words."""
        kv_heads, head_dim = _heads(config)
        before, after = 4 * head_dim, self.resolved.token_bytes(head_dim)
        heads, window = kv_heads * num_blocks, self.resolved.window
        kept = f"; the newest {window} tokens and the first {self.resolved.sinks} stay as they are" if window else ""
        return f"keys and values take {heads * after:,.0f} bytes a token, not {heads * before:,}{kept}"

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is to be done to a block."""
        return []


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """The key-value heads of a layer, and the channels of one."""
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
