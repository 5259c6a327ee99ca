"""Grouped-query attention out of multi-head attention, or fewer groups out of more (Ainslie et al., arXiv 2305.13245).

Heads of keys and values that are alike are put into a group, brought as near to each other as they come without a
change of the function, and made one (`compress.core.heads`): projections and cache shrink, all heads of queries stay.
Then the output projection is solved for again, so that what it makes of the merged heads' outputs ẑ is what the
original made of its own z, in the mean square over calibration (`compress.core.channels.reconstruct`):

    W′ = W + (W E[z ẑᵀ] - W E[ẑ ẑᵀ]) (E[ẑ ẑᵀ] + λI)⁻¹

z is that of the original model, its heads aligned in the same way so that its channels are those of ẑ; ẑ that of a
model whose blocks so far are merged, so W′ makes up for some of their errors as well. The paper averages neighbours as
they are (`align: false`) and trains for a twentieth of the pretraining; here training is left to later stages.

Alignment scales and turns pairs of a key's channels, j and j + d/2, as rotary embeddings of Llama's layout turn them.
Where other channels are pairs, only some are turned, or a norm comes in between, that is no symmetry, and the model is
refused.

KL divergence on other texts, of stories260k (heads of keys and values 4 → 2) and of the demo's model trained with as
many as it has queries (8 → 4): by the mean of neighbours 3.18 and 1.57, refitted 2.23 and 0.90; aligned 0.67 and 0.44,
refitted 0.52 and 0.15. To aim at W z + x - x̂, x and x̂ being the residual streams, lowers the last two to 0.49 and 0.14;
it is not done, since not every family adds outputs to the stream as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.channels import DAMPING, reconstruct
from compress.core.heads import Attention, merged, to_gqa
from compress.core.kv import heads_of
from compress.core.metrics import quadratic_form, relative_error
from compress.core.scheme import Scheme
from compress.errors import naming
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, canonical
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.activations import Activations
    from compress.calibrate.block import Block
    from compress.calibrate.observers import Moments

FAMILIES = frozenset({"gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "qwen2", "smollm3"})
"""Those whose rotary embeddings turn channels j and j + d/2 of a head together, all of them, if they turn any."""


@dataclass(frozen=True)
class MergeHeads:
    """The stage `merge_heads`."""

    name: ClassVar[str] = "merge_heads"
    role: ClassVar[Role] = "shaper"
    for_inputs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True
    learns: ClassVar[bool] = False

    kv_heads: int | float
    """Heads of keys and values that are left in each layer; below 1 the share of them."""
    align: bool = True
    """Group heads by what they do, and align them; false: neighbours are averaged as they are."""
    refit: bool = True
    """Solve for the output projection again."""

    def __post_init__(self) -> None:
        if self.kv_heads <= 0 or (isinstance(self.kv_heads, float) and self.kv_heads >= 1):
            raise ValueError(f"kv_heads={self.kv_heads} must be a number of heads, as 2, or a share below 1, as 0.5")

    @property
    def two_streams(self) -> bool:
        return self.refit

    def num_groups(self, heads: int) -> int:
        """How many are left of so many heads."""
        return round(self.kv_heads * heads) if isinstance(self.kv_heads, float) else self.kv_heads

    def problems(self, folder: Folder, anatomy: Anatomy) -> list[str]:
        if reason := obstacle(folder, anatomy):
            return [f"{anatomy.family}: heads cannot be merged, because {reason}"]
        heads, _ = heads_of(folder.config)
        fitting = [count for count in range(1, heads) if heads % count == 0]
        if self.num_groups(heads) in fitting:
            return []
        advice = f"Use {' or '.join(map(str, fitting))}" if fitting else "There is nothing to merge"
        return [f"kv_heads={self.kv_heads}: {heads} heads cannot be merged into that many groups of one size. {advice}"]

    def folder(self, folder: Folder, anatomy: Anatomy) -> Folder:
        heads, head_dim = heads_of(folder.config)
        count = self.num_groups(heads)
        tensors = dict(folder.tensors)
        for name, header in canonical(folder.tensors, anatomy).items():
            local = name.removeprefix(f"{anatomy.blocks}.").partition(".")[2].rpartition(".")[0]
            if anatomy.roles.get(local) in {"attn.k", "attn.v"}:
                tensors[header.name] = replace(header, shape=(count * head_dim, *header.shape[1:]))
        return replace(folder, config={**folder.config, "num_key_value_heads": count}, tensors=tensors)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do: see `shape`."""
        return []

    def shape(self, block: Block, learned: Mapping[str, Tensor]) -> list[LayerReport]:
        """Merge the heads of one block."""
        heads, head_dim = heads_of(block.model.weights.folder.config)
        count = self.num_groups(heads)
        sites = {role: (site, name) for site in block.sites for role, name in zip(site.roles, site.layers, strict=True)}
        (_, query), (reading, key), (_, value), (writing, output) = (sites[f"attn.{part}"] for part in "qkvo")
        hessian = _with_one(block.moments(reading))
        q, k, v = (_with_bias(block, name) for name in (query, key, value))
        given = Attention(q, k, v, block.weight(output).double(), head_dim)
        if self.align:
            given, grouped = to_gqa(given, hessian, count)
        else:
            grouped = merged(given, count, torch.full((heads, head_dim // 2), count / heads).to(hessian))

        def write(attention: Attention, dtype: torch.dtype) -> None:
            for name, weight in ((query, attention.query), (key, attention.key), (value, attention.value)):
                rounded = weight.to(dtype).float()
                block.rewrite(name, rounded[:, :-1], rounded[:, -1] if block.has_bias(name) else None)
            block.rewrite(output, attention.output.to(dtype).float())
            module = block.model.module.get_submodule(key.rpartition(".")[0])
            module.num_key_value_groups = attention.num_queries  # type: ignore[assignment]

        if self.refit:
            write(given, torch.float32)
            _ = block.reference  # whose channels are aligned now
        stored_as = block.model.weights.dtype(f"{output}.weight")
        write(grouped, stored_as)
        reports = []
        for name, old, new in ((key, given.key, grouped.key), (value, given.value, grouped.value)):
            spread = new.unflatten(0, (count, -1)).repeat_interleave(heads // count, dim=0).flatten(0, 1)
            reports.append(LayerReport(name, f"{heads} → {count} heads", relative_error(old, spread, hessian)))
        if self.refit:
            seen = block.moments(writing, cross=True)
            every = torch.arange(len(seen.hessian), device=seen.hessian.device)
            with naming(output):
                solved, damping = reconstruct(given.output, seen.hessian, every, seen.cross)
            solved = solved.to(stored_as).float()
            block.rewrite(output, solved)
            raised = f"damping {damping:g}, not {DAMPING:g}: the Hessian was not positive definite"
            error = _error(given.output, solved.double(), seen, block.reference.sites[writing.index])
            reports.append(LayerReport(output, "refitted", error, raised if damping > DAMPING else None))
        return reports


def obstacle(folder: Folder, anatomy: Anatomy) -> str | None:
    """Why heads of this model cannot be merged; None where they can."""
    config = folder.config
    rotary = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    norms = [name for name in folder.tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]
    if not {"attn.q", "attn.k", "attn.v", "attn.o"} <= set(anatomy.roles.values()):
        return "queries, keys and values are not layers of their own"
    if norms:
        return f"keys pass a norm, {norms[0]}, before they are rotated"
    if rotary.get("partial_rotary_factor", 1) != 1:
        return f"only a part of each head is rotated, partial_rotary_factor={rotary['partial_rotary_factor']}"
    if anatomy.family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return f"it is not known to rotate channels j and j + d/2 of a head together. Known are {known}"
    return None


def _with_one(seen: Moments) -> Float[Tensor, "joined joined"]:
    """E[x xᵀ] of inputs with a 1 behind them: its column of a weight is the bias."""
    H = torch.nn.functional.pad(seen.hessian.double(), (0, 1, 0, 1), value=1.0)
    H[-1, :-1] = H[:-1, -1] = seen.mean
    return H


def _with_bias(block: Block, name: str) -> Float[Tensor, "out joined"]:
    weight = block.weight(name).double()
    bias = block.vector(f"{name}.bias") if block.has_bias(name) else weight.new_zeros(len(weight))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def _error(
    weight: Float[Tensor, "out in"], solved: Float[Tensor, "out in"], seen: Moments, original: Activations
) -> float:
    """E‖W z - W′ ẑ‖² / E‖W z‖². `original`: z."""
    assert seen.cross is not None, "it was asked for"
    energy = 0.0
    for window in range(original.windows):
        y = original.read(window, window + 1).to(weight.device).flatten(0, -2).float() @ weight.T.float()
        energy += float(y.square().sum(dtype=torch.float64)) / len(y) / original.windows
    shared = float((weight @ seen.cross.to(weight) * solved).sum())
    return max(0.0, energy - 2 * shared + quadratic_form(solved, seen.hessian)) / energy if energy else 0.0
