"""Quantization of the KV cache: what a model remembers while it runs, in few bits. Weights stay as they are.

The scheme (`compress.core.kv`) is written into config.json, where `compress.load` finds it. Where scales follow the
data there is nothing to calibrate, and other readers pass it over. The scales of `fp8` are fixed here, from the largest
key and value that the block computes by now, and serving engines read them. What it costs shows only where the past is
read from the cache, so a run with this stage is scored on the decode path.

With `bits_per_number` in place of a scheme, each layer gets the one of `choices` that makes the model's predictions
diverge least within that budget (`compress.calibrate.choices`). For that all keys and values are rounded, those too
that a window would keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from compress.calibrate.cached import Rounded, largest_cached, with_cache
from compress.calibrate.choices import choose
from compress.core.kv import KVScheme, heads_of, parse_kv_scheme, static_scale
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.store import LazyModel
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

    scheme: str | None = None
    bits_per_number: float | None = None
    """In place of a scheme: the budget, over keys and values of all layers, scales and minima included."""
    choices: tuple[str, ...] = ("kv8", "kv4", "kv2")
    samples: int = 8
    """Calibration windows that choices are measured on."""

    def __post_init__(self) -> None:
        if (self.scheme is None) == (self.bits_per_number is None):
            raise ValueError("give a scheme for all layers, as kv8, or bits_per_number and choices among schemes")
        for name in (*self.choices, *([self.scheme] if self.scheme else [])):
            parse_kv_scheme(name)
        if len(set(self.choices)) < 2 or any(scheme.static for scheme in self._offered if not self.scheme):
            raise ValueError(f"choices={list(self.choices)} must be two or more different schemes, none of them fp8")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1; 8 is usual")

    @property
    def calibrated(self) -> bool:
        """Whether scales are fixed here, or schemes chosen."""
        return self.scheme is None or self.static is not None

    @property
    def static(self) -> KVScheme | None:
        """The scheme, if its scales are fixed here."""
        return next((scheme for scheme in self._offered if scheme.static), None)

    @property
    def _offered(self) -> list[KVScheme]:
        return [parse_kv_scheme(name) for name in ([self.scheme] if self.scheme else self.choices)]

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any]) -> list[str]:
        """Why the cache of this model cannot be kept so, a sentence each."""
        if anatomy.head is None:
            return [f"the {anatomy.family} model ends without a head: it does not generate, and has no cache"]
        _, head_dim = heads_of(config)
        try:
            least = min(scheme.token_bytes(head_dim) for scheme in self._offered)
        except ValueError as error:
            return [str(error)]
        if self.bits_per_number is not None and self.bits_per_number < 4 * least / head_dim:
            return [f"bits_per_number={self.bits_per_number} is less than the {4 * least / head_dim:g} of the smallest "
                    "choice, scales included. Raise it, or offer fewer bits"]  # fmt: skip
        return []

    def summary(self, config: Mapping[str, Any], num_blocks: int) -> str:
        """What it does to the memory of a token, in words."""
        kv_heads, head_dim = heads_of(config)
        heads = kv_heads * num_blocks
        before = heads * 4 * head_dim
        if self.bits_per_number is not None:
            budget = heads * head_dim * self.bits_per_number / 4
            return (
                f"keys and values take at most {budget:,.0f} bytes a token, not {before:,}; schemes are chosen by layer"
            )
        scheme = self._offered[0]
        kept = (
            f"; the newest {scheme.window} tokens and the first {scheme.sinks} stay as they are"
            if scheme.window
            else ""
        )
        return f"keys and values take {heads * scheme.token_bytes(head_dim):,.0f} bytes a token, not {before:,}{kept}"

    def decide(self, model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path) -> dict[str, Any]:
        """The scheme of every layer, under `schemes`, and how they were found; plain data. `scratch`: a folder to be
        made and removed."""
        assert self.bits_per_number is not None
        kv_heads, head_dim = heads_of(model.weights.folder.config)
        sizes = [int(kv_heads * scheme.token_bytes(head_dim)) for scheme in self._offered]
        layers = range(len(model.blocks))
        decision = choose(
            model,
            tokens[: self.samples],
            scratch,
            [sizes for _ in layers],
            sizes,
            int(self.bits_per_number * kv_heads * 2 * head_dim * len(layers) / 8),
            lambda block: [block.index],
            lambda block, chosen: with_cache(block, Rounded(self._offered[chosen[block.index]])),
        )
        return {
            "schemes": [self.choices[choice] for choice in decision.choices],
            **decision.facts,
            "uniform": [
                {"scheme": name, "bytes": total, "predicted": sum(cost[choice] for cost in decision.costs)}
                for choice, (name, total) in enumerate(zip(self.choices, decision.totals, strict=True))
            ],
            "sensitivity": [
                {"layer": layer, "cost_by_scheme": dict(zip(self.choices, decision.costs[layer], strict=True))}
                for layer in layers
            ],
        }

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Fix the scales of a block's keys and values, where the scheme has such."""
        if self.static:
            keys, values = (static_scale(largest, self.static.by_head) for largest in largest_cached(block))
            block.cache_scales = keys, values
        return []
