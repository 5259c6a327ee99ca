"""Narrower blocks: channels inside MLPs go, and groups of heads that share keys and values, with all their queries.

A unit feeds one layer W, the MLP's down projection or attention's output projection: as one column of it, or as the
columns of a group's heads. It goes from there, and as rows from the layers that make it. `compress.core.channels` says
which units go, and what W becomes for the inputs z_S that are left: `refit` solves

    min E‖W z - W′ z_S - s‖² + λ‖W′ - W_S‖²

on what the blocks pruned so far make of the calibration text; in the MLP, after the block's attention has shrunk. The
shift s goes into W's bias if it has one, and is 0 if not. To aim at W z on the original model's stream instead is no
better: a Llama of 13M parameters then has a KL divergence of 0.069 and not 0.068 without a quarter of its channels, of
0.171 and not 0.170 without half of its heads.

All blocks keep the same numbers, since config.json has one for all of them (as in Minitron, arXiv 2407.14679; in FLAP,
2312.11983, blocks differ).

Scores tell what a layer's output loses, but for `taylor`, which tells what predictions lose. It is taken of the model
as it is before the first block shrinks, by gradients that come block by block (`compress.calibrate.gradients`), and
doubles the time of the stage. The Llama of 13M parameters is best served by it without a quarter of its channels
(0.060; obs 0.068, greedy_obs 0.065), stories260k is not (0.74; 0.71, 0.73).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.calibrate.gradients import input_gradients
from compress.calibrate.observers import Moments
from compress.core import channels
from compress.core.channels import DAMPING, channels_of, choose, greedy_obs, reconstruct
from compress.core.kv import heads_of
from compress.core.metrics import relative_error
from compress.core.scheme import Scheme
from compress.core.widths import rounded_size
from compress.errors import naming
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, canonical
from compress.models.store import LazyModel
from compress.stage import LayerReport, Learned, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Score = Literal["magnitude", "wanda", "flap", "taylor", "obs", "greedy_obs"]
Counts = Mapping[str, tuple[int, int]]
"""Part of a block, of those that shrink → how many of its units are kept, of how many."""
UNITS = {"attn": "groups of heads", "mlp": "channels"}
"""What each part of a block is made of, in the order in which they shrink."""
MAKING = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "mlp.gate_up")
"""Roles of the layers that make units: rows go."""
FED = {"attn": "attn.o", "mlp": "mlp.down"}
"""Part → role of the layer that its units feed: columns go."""


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What is left of a layer on fewer inputs."""

    weight: Float[Tensor, "out kept"]
    units: Int[Tensor, " units"]
    """Those that stay, ascending."""
    damping: float


def narrowed(
    weight: Float[Tensor, "out in"],
    seen: Moments | None,
    count: int,
    size: int = 1,
    *,
    score: Score = "obs",
    refit: bool = True,
    damping: float = DAMPING,
    scores: Float[Tensor, " units"] | None = None,
) -> Narrowed:
    """A layer on `count` of its units of `size` inputs. `seen`: of its inputs; None: magnitudes alone, and no refit.
    `scores`: by `taylor`, where that is the score.

    Raises as `compress.core.channels` does.
    """
    if seen is None or score == "magnitude":
        units = choose(channels.magnitude(weight, size), count)
    elif score == "wanda":
        units = choose(channels.wanda(weight, seen.hessian, size), count)
    elif score == "flap":
        units = choose(channels.flap(weight, seen.hessian, seen.mean, size), count)
    elif score == "taylor":
        assert scores is not None, "they come from the whole model"
        units = choose(scores, count)
    elif score == "obs":
        units = choose(channels.obs(weight, seen.hessian, size, damping=damping), count)
    else:
        units = greedy_obs(weight, seen.hessian, count, size, damping=damping)
    keep = channels_of(units, size)
    if seen is None or not refit:
        return Narrowed(weight[:, keep], units, damping)
    solved, used = reconstruct(weight, seen.hessian, keep, damping=damping)
    return Narrowed(solved, units, used)


def centred(seen: Moments) -> Moments:
    """Of the inputs less their mean: all that is to be explained where a bias takes up the mean."""
    return replace(seen, hessian=seen.hessian - seen.mean.outer(seen.mean), mean=torch.zeros_like(seen.mean))


@dataclass(frozen=True)
class Width:
    """The stage `width`."""

    name: ClassVar[str] = "width"
    role: ClassVar[Role] = "shaper"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    ffn: float = 1.0
    """The share of an MLP's channels that stays."""
    heads: float = 1.0
    """The share of the heads that stays, in whole groups of those that share keys and values."""
    score: Score = "obs"
    refit: bool = True
    multiple: int = 32
    """What the channels of an MLP come in, for the sake of kernels."""
    damping: float = DAMPING
    """As a fraction of the Hessian's mean diagonal."""

    def __post_init__(self) -> None:
        for name, share in (("ffn", self.ffn), ("heads", self.heads)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share} must be the share that stays, above 0 and at most 1")
        if self.ffn == self.heads == 1:
            raise ValueError("nothing would go: set ffn or heads below 1, as 0.75")
        if self.score not in get_args(Score):
            raise ValueError(f"score={self.score!r} must be one of {', '.join(get_args(Score))}")
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple} must be at least 1; kernels like 32, 64 and 128")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping={self.damping} must be above 0 and at most 1; 0.01 is usual")

    @property
    def calibrated(self) -> bool:
        return self.score != "magnitude" or self.refit

    @property
    def learns(self) -> bool:
        return self.score == "taylor"

    def counts(self, folder: Folder, anatomy: Anatomy) -> Counts:
        """How many units each part keeps, in every block."""
        counts = {}
        if self.heads < 1:
            groups, _ = heads_of(folder.config)
            counts["attn"] = rounded_size(self.heads * groups, groups), groups
        if self.ffn < 1:
            down = next(layer for layer, role in anatomy.roles.items() if role == FED["mlp"])
            shape = canonical(folder.tensors, anatomy)[f"{anatomy.blocks}.0.{down}.weight"].shape
            width = shape[0] if anatomy.transposed else shape[1]
            counts["mlp"] = rounded_size(self.ffn * width, width, self.multiple), width
        return counts

    def problems(self, folder: Folder, anatomy: Anatomy) -> list[str]:
        found = []
        if self.ffn < 1 and not anatomy.ffn_size:
            found.append(f"{anatomy.family}: it is not known by which key its config tells ffn. Set ffn: 1.0")
        if self.heads < 1 and anatomy.fixed_heads:
            found.append(f"{anatomy.family}: heads cannot go, because {anatomy.fixed_heads}. Set heads: 1.0")
        if self.learns and anatomy.head is None:
            found.append(f"{anatomy.family}: score=taylor is about predictions, and no head makes any. Use score: obs")
        if found:
            return found
        counts = self.counts(folder, anatomy)
        if "mlp" in counts and counts["mlp"][0] == counts["mlp"][1]:
            found.append(
                f"ffn={self.ffn} of {counts['mlp'][1]} channels, in multiples of {self.multiple}, is all of them. "
                "Lower the multiple, or set ffn: 1.0"
            )
        if "attn" in counts:
            found += self._impossible_heads(folder.config, anatomy, *counts["attn"])
        return found

    def folder(self, folder: Folder, anatomy: Anatomy) -> Folder:
        counts = self.counts(folder, anatomy)
        tensors = dict(folder.tensors)
        for name, header in canonical(folder.tensors, anatomy).items():
            layer, _, leaf = name.removeprefix(f"{anatomy.blocks}.").partition(".")[2].rpartition(".")
            role = anatomy.roles.get(layer, "")
            part = role.partition(".")[0]
            if part in counts and (role in MAKING or leaf == "weight"):
                kept, total = counts[part]
                axis = int((role in MAKING) == (anatomy.transposed and leaf == "weight"))
                shape = (*header.shape[:axis], header.shape[axis] * kept // total, *header.shape[axis + 1 :])
                tensors[header.name] = replace(header, shape=shape)
        return replace(folder, config=resized(folder.config, anatomy, counts), tensors=tensors)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do: see `shape`."""
        return []

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        """Layer → the scores of its units by `taylor`."""
        counts = self.counts(model.weights.folder, model.anatomy)
        totals = {FED[part]: total for part, (_, total) in counts.items()}
        scores: dict[str, Tensor] = {}
        for seen in input_gradients(model, tokens, scratch, totals):
            size = seen.inputs.shape[1] // totals[seen.role]
            found = channels.taylor(seen.inputs.float(), seen.gradient.float(), size).cpu()
            scores[seen.layer] = scores[seen.layer] + found if seen.layer in scores else found
        return Learned(scores, {})

    def shape(self, block: Block, learned: Mapping[str, Tensor]) -> list[LayerReport]:
        """Narrow one block."""
        counts = self.counts(block.model.weights.folder, block.model.anatomy)
        return [self._narrow(block, part, *counts[part], learned) for part in UNITS if part in counts]

    def _narrow(self, block: Block, part: str, kept: int, total: int, learned: Mapping[str, Tensor]) -> LayerReport:
        site = next(site for site in block.sites if FED[part] in site.roles)
        name = site.layers[0]
        weight, bias = block.weight(name), None
        observed = block.moments(site) if self.calibrated else None
        shifts = self.refit and block.has_bias(name)
        seen = centred(observed) if observed and shifts else observed
        size = weight.shape[1] // total
        scores = learned[name].to(weight.device) if self.learns else None
        with naming(name):
            left = narrowed(
                weight, seen, kept, size, score=self.score, refit=self.refit, damping=self.damping, scores=scores
            )
        stored = _as_stored(block, name, left.weight)
        spread = torch.zeros_like(weight).index_copy_(1, channels_of(left.units, size), stored)
        if observed and shifts:
            bias = block.vector(f"{name}.bias") + (weight - spread) @ observed.mean.to(weight)
            bias = _as_stored(block, name, bias)
        for making in block.sites:
            for layer, role in zip(making.layers, making.roles, strict=True):
                if role in MAKING and role.startswith(part):
                    _keep_rows(block, layer, _rows(left.units, total, role, len(block.weight(layer))))
        block.rewrite(name, stored, bias)
        raised = f"damping {left.damping:g}, not {self.damping:g}: the Hessian was not positive definite"
        return LayerReport(
            name,
            f"{total} → {kept} {UNITS[part]}",
            relative_error(weight, spread, seen.hessian if seen else None),
            raised if left.damping > self.damping else None,
        )

    def _impossible_heads(self, config: Mapping[str, Any], anatomy: Anatomy, kept: int, total: int) -> list[str]:
        if kept == total:
            return ["all heads share one head of keys and values, so none can go. Set heads: 1.0"]
        reason = refusal(resized(config, anatomy, {"attn": (kept, total)}))
        if not reason:
            return []
        fits = [n for n in range(1, total) if not refusal(resized(config, anatomy, {"attn": (n, total)}))]
        advice = " or ".join(f"{n / total:.3g}" for n in fits) or "1.0"
        return [
            f"heads={self.heads} leaves {kept} of {total} groups, and transformers says: {reason} Set heads: {advice}"
        ]


def resized(config: Mapping[str, Any], anatomy: Anatomy, counts: Counts) -> dict[str, Any]:
    """The config of a model with so many units."""
    changed = dict(config)
    if "mlp" in counts:
        changed[anatomy.ffn_size], _ = counts["mlp"]
    if "attn" in counts:
        kept, total = counts["attn"]
        heads, (_, head_dim) = config["num_attention_heads"] * kept // total, heads_of(config)
        changed |= {"num_attention_heads": heads, "num_key_value_heads": kept, "head_dim": head_dim}
    return changed


def refusal(config: Mapping[str, Any]) -> str | None:
    """What transformers has against a config, None where it takes it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except (StrictDataclassError, ValueError) as error:
        return str(error.__cause__ or error)
    return None


def _rows(units: Int[Tensor, " units"], total: int, role: str, count: int) -> Int[Tensor, " rows"]:
    """The rows, of `count`, that make these of `total` units."""
    if role == "mlp.gate_up":
        return torch.cat([units, units + total])
    return channels_of(units, count // total)


def _keep_rows(block: Block, name: str, rows: Int[Tensor, " rows"]) -> None:
    bias = block.vector(f"{name}.bias")[rows] if block.has_bias(name) else None
    block.rewrite(name, block.weight(name)[rows], bias)


def _as_stored(block: Block, name: str, value: Tensor) -> Tensor:
    return value.to(block.model.weights.dtype(f"{name}.weight")).float()
