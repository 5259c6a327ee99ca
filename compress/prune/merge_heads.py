"""Grouped-query attention out of multi-head attention, or fewer groups out of more (Ainslie et al., arXiv 2305.13245).

Heads of keys and values that are alike are put into a group, brought as near to each other as they come without a
change of the function, and made one (`compress.core.heads`): the cache and the projections shrink, all heads of queries
stay. Then the output projection is solved for again, so that what it makes of the merged heads' outputs ẑ is, in the
mean square over calibration, what the original made of its own z (`compress.core.channels.reconstruct`):

    W′ = W E[z ẑᵀ] (E[ẑ ẑᵀ] + λI)⁻¹, drawn towards W by λ.

z comes from the original model's stream, with heads aligned in the same way, so that its channels are those of ẑ; ẑ from
that of the blocks already merged, whose errors W′ makes up for as well. The paper trains instead, on a twentieth of the
tokens of pretraining; here that is left to a `distill` stage behind this one. With `align` off neighbours are averaged
as they are, which is what the paper does, for comparison.

Alignment scales and turns pairs of a key's channels, j and j + d/2, which rotary embeddings of Llama's layout turn as
well. Where other channels are pairs, only some are turned, or a norm stands in between, it would be no symmetry, and
the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.channels import reconstruct
from compress.core.heads import Attention, merged, to_gqa
from compress.core.kv import heads_of
from compress.core.metrics import relative_error
from compress.core.scheme import Scheme
from compress.errors import naming
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, canonical
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block
    from compress.calibrate.observers import Moments

ROTATED_IN_HALVES = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "qwen2", "smollm3"}
)  # fmt: skip
"""Families whose rotary embeddings turn channels j and j + d/2 of a head together, all of them."""


@dataclass(frozen=True)
class MergeHeads:
    """The stage `merge_heads`."""

    name: ClassVar[str] = "merge_heads"
    role: ClassVar[Role] = "shaper"
    for_inputs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    kv_heads: int | float
    """Heads of keys and values that are left in each layer, or, below 1, the share of them."""
    align: bool = True
    """Group heads by what they do and align them; false: neighbours are averaged as they are."""
    refit: bool = True
    """Solve for the output projection again."""

    def __post_init__(self) -> None:
        share = isinstance(self.kv_heads, float)
        if not (0 < self.kv_heads < 1 if share else self.kv_heads >= 1):
            raise ValueError(
                f"kv_heads={self.kv_heads} must be a number of heads, as 2, or a share of them below 1, as 0.5"
            )

    @property
    def two_streams(self) -> bool:
        return self.refit

    def num_groups(self, config: Mapping[str, Any]) -> int | None:
        """The heads that are left in a model of this config; None where there is no such number below what it has."""
        heads, _ = heads_of(config)
        count = self.kv_heads * heads if isinstance(self.kv_heads, float) else self.kv_heads
        return int(count) if count == int(count) and count < heads and heads % count == 0 else None

    def problems(self, folder: Folder, anatomy: Anatomy) -> list[str]:
        reason = obstacle(folder, anatomy)
        if reason:
            return [f"{anatomy.family}: heads cannot be merged, because {reason}"]
        if self.num_groups(folder.config) is None:
            heads, _ = heads_of(folder.config)
            fitting = [count for count in range(1, heads) if heads % count == 0]
            offered = f"it can be {', '.join(map(str, fitting))}" if fitting else "no fewer can be left"
            return [f"kv_heads={self.kv_heads} of {heads}: groups must be of equal size; {offered}"]
        return []

    def folder(self, folder: Folder, anatomy: Anatomy) -> Folder:
        count, (_, head_dim) = self.num_groups(folder.config), heads_of(folder.config)
        assert count, "it would be among the problems"
        tensors = dict(folder.tensors)
        for name, header in canonical(folder.tensors, anatomy).items():
            local = name.removeprefix(f"{anatomy.blocks}.").partition(".")[2].rpartition(".")[0]
            if anatomy.roles.get(local) in {"attn.k", "attn.v"}:
                tensors[header.name] = replace(header, shape=(count * head_dim, *header.shape[1:]))
        return replace(folder, config={**folder.config, "num_key_value_heads": count}, tensors=tensors)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do: see `shape`."""
        return []

    def shape(self, block: Block) -> list[LayerReport]:
        """Merge the heads of one block."""
        config = block.model.weights.folder.config
        count, (heads, head_dim) = self.num_groups(config), heads_of(config)
        assert count, "it would be among the problems"
        names = {role: name for site in block.sites for role, name in zip(site.roles, site.layers, strict=True)}
        query, key, value, output = (names[f"attn.{part}"] for part in "qkvo")
        reading, writing = (next(site for site in block.sites if name in site.layers) for name in (key, output))
        hessian = _with_one(block.moments(reading))
        given = Attention(
            *(_with_bias(block, name) for name in (query, key, value)), block.weight(output).double(), head_dim
        )
        with naming(key, value):
            if self.align:
                given, grouped = to_gqa(given, hessian, count)
            else:
                grouped = merged(given, count, torch.full((heads, head_dim // 2), count / heads).to(hessian))

        def write(attention: Attention) -> None:
            for name, weight in ((query, attention.query), (key, attention.key), (value, attention.value)):
                bias = _as_stored(block, name, weight[:, -1]) if block.has_bias(name) else None
                block.rewrite(name, _as_stored(block, name, weight[:, :-1]), bias)
            block.rewrite(output, _as_stored(block, output, attention.output))
            module = block.model.module.get_submodule(key.rpartition(".")[0])
            module.num_key_value_groups = attention.num_queries  # type: ignore[assignment]

        if self.refit:
            write(given)
            _ = block.reference  # what the original's output projection reads, now that its channels are aligned
        write(grouped)
        reports = [
            LayerReport(name, f"{heads} → {count} heads", relative_error(old, _repeated(new, heads, count), hessian))
            for name, old, new in ((key, given.key, grouped.key), (value, given.value, grouped.value))
        ]
        if self.refit:
            seen = block.moments(writing, cross=True)
            with naming(output):
                refitted, damping = reconstruct(given.output, seen.hessian, torch.arange(len(seen.hessian)), seen.cross)
            block.rewrite(output, _as_stored(block, output, refitted))
        return reports


def obstacle(folder: Folder, anatomy: Anatomy) -> str | None:
    """Why keys of this model cannot be aligned and merged; None where they can."""
    config = folder.config
    rotary = {**config, **(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    norms = sorted(name for name in folder.tensors if name.endswith(("q_norm.weight", "k_norm.weight")))
    if not {"attn.q", "attn.k", "attn.v", "attn.o"} <= set(anatomy.roles.values()):
        return "queries, keys and values are not layers of their own"
    if norms:
        return f"a norm, {norms[0]}, stands between keys and their rotary embedding"
    if rotary.get("partial_rotary_factor", 1) != 1:
        return (
            f"rotary embeddings turn a part of each head only, partial_rotary_factor={rotary['partial_rotary_factor']}"
        )
    if anatomy.family not in ROTATED_IN_HALVES:
        known = ", ".join(sorted(ROTATED_IN_HALVES))
        return f"it is not known how rotary embeddings pair the channels of its keys; known are {known}"
    return None


def _with_one(seen: Moments) -> Float[Tensor, "n+1 n+1"]:
    """E[x xᵀ] of inputs with a 1 behind them, whose column of a weight is the bias."""
    top = torch.cat([seen.hessian, seen.mean.unsqueeze(1)], dim=1).double()
    return torch.cat([top, torch.cat([top[:, -1], top.new_ones(1)]).unsqueeze(0)])


def _with_bias(block: Block, name: str) -> Float[Tensor, "out n+1"]:
    weight = block.weight(name).double()
    bias = block.vector(f"{name}.bias") if block.has_bias(name) else weight.new_zeros(len(weight))
    return torch.cat([weight, bias.double().unsqueeze(1)], dim=1)


def _as_stored(block: Block, name: str, value: Tensor) -> Tensor:
    return value.to(block.model.weights.dtype(f"{name}.weight")).float()


def _repeated(weight: Float[Tensor, "kept in"], heads: int, count: int) -> Float[Tensor, "keys in"]:
    """Each head as often as it stands for one of the given."""
    return weight.unflatten(0, (count, -1)).repeat_interleave(heads // count, dim=0).flatten(0, 1)
