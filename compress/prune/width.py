"""Narrower blocks: channels of MLPs go, and heads of attention, and the matrices around them shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import os
import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.core import channels
from compress.core.metrics import relative_error
from compress.core.scheme import Scheme
from compress.core.widths import rounded_size
from compress.models.headers import canonical
from compress.stage import LayerReport, Role

ASYM = os.environ.get("ASYM", "")
Score = Literal["magnitude", "wanda", "flap", "obs", "greedy_obs"]
READERS = ("mlp.gate", "mlp.up", "mlp.gate_up", "attn.q", "attn.k", "attn.v")
WRITERS = ("mlp.down", "attn.o")


def units_to_keep(weight, hessian, mean, count, size, score, damping):
    if score == "magnitude":
        return channels.choose(channels.magnitude(weight, size), count)
    if score == "wanda":
        return channels.choose(channels.wanda(weight, hessian, size), count)
    if score == "flap":
        return channels.choose(channels.flap(weight, hessian, mean, size), count)
    if score == "obs":
        return channels.choose(channels.obs(weight, hessian, size, damping=damping), count)
    return channels.greedy_obs(weight, hessian, count, size, damping=damping)


@dataclass(frozen=True)
class Width:
    name: ClassVar[str] = "width"
    role: ClassVar[Role] = "shaper"
    for_inputs: ClassVar[bool] = False

    ffn: float = 1.0
    heads: float = 1.0
    score: Score = "obs"
    refit: bool = True
    multiple: int = 32
    damping: float = 0.01

    @property
    def two_streams(self):
        return bool(ASYM)

    @property
    def calibrated(self) -> bool:
        return True

    def problems(self, folder, anatomy):
        return []

    def counts(self, folder, anatomy):
        tensors = canonical(folder.tensors, anatomy)
        shapes = {}
        for layer, role in anatomy.roles.items():
            shape = tensors[f"{anatomy.blocks}.0.{layer}.weight"].shape
            shapes[role] = shape[::-1] if anatomy.transposed else shape
        total = shapes["mlp.down"][1]
        found = {"mlp": (rounded_size(self.ffn * total, total, self.multiple), total), "attn": (1, 1)}
        if self.heads < 1:
            head_dim = shapes["attn.q"][0] // folder.config["num_attention_heads"]
            groups = shapes["attn.k"][0] // head_dim
            found["attn"] = (rounded_size(self.heads * groups, groups), groups)
        return found, shapes

    def folder(self, folder, anatomy):
        counts, shapes = self.counts(folder, anatomy)
        tensors = dict(folder.tensors)
        for name, header in canonical(folder.tensors, anatomy).items():
            path, _, leaf = name.rpartition(".")
            role = anatomy.roles.get(path.removeprefix(f"{anatomy.blocks}.").partition(".")[2], "")
            axis = 0 if role in READERS else 1 if role in WRITERS and leaf == "weight" else None
            if axis is not None:
                kept, total = counts[role.partition(".")[0]]
                axis = 1 - axis if anatomy.transposed and len(header.shape) == 2 else axis
                shape = list(header.shape)
                shape[axis] = shape[axis] * kept // total
                tensors[header.name] = replace(header, shape=tuple(shape))
        config = dict(folder.config)
        if self.ffn < 1:
            config[anatomy.ffn_size] = counts["mlp"][0]
        if self.heads < 1:
            kept, total = counts["attn"]
            heads = config["num_attention_heads"]
            config |= {"head_dim": shapes["attn.q"][0] // heads, "num_attention_heads": heads * kept // total, "num_key_value_heads": kept}
        return replace(folder, config=config, tensors=tensors)

    def shape(self, block):
        if ASYM:
            block.reference
        counts, _ = self.counts(block.model.weights.folder, block.model.anatomy)
        reports = []
        if self.heads < 1:
            reports.append(self._narrow(block, "attn", *counts["attn"]))
        if self.ffn < 1:
            reports.append(self._narrow(block, "mlp", *counts["mlp"]))
        return reports

    def _narrow(self, block, part, count, total):
        site = next(site for site in block.sites if site.roles[0] in WRITERS and site.roles[0].startswith(part))
        name = site.layers[0]
        cross = ASYM in ("cross", "both")
        m = block.moments(site, cross=bool(cross))
        W = block.weight(name)
        size = W.shape[1] // total
        H = m.hessian
        bias = block.has_bias(name) and self.refit
        if bias:
            H = H - torch.outer(m.mean, m.mean)
        keep = units_to_keep(W, m.hessian if self.score == "flap" else H, m.mean, count, size, self.score, self.damping)
        chan = channels.channels_of(keep, size)
        new = W[:, chan]
        if self.refit:
            target = W
            C = m.cross if cross else None
            if part == "mlp" or ASYM != "residual":
                new, _ = channels.reconstruct(W, H, chan, C, damping=self.damping)
            if ASYM in ("residual", "both"):
                # add: E[(x - xhat) zhat_S^T] (H_SS+λ)^-1, residual correction
                D = residual_moment(block, site)[:, chan]
                from compress.core.linalg import inverse_cholesky
                upper, _ = inverse_cholesky(H, self.damping, chan)
                a = float(os.environ.get("ALPHA", "1"))
                new = (new.double() + a * D @ upper.T @ upper).to(W)
        dt = block.model.weights.dtype(f"{name}.weight")
        stored = new.to(dt).float()
        full = torch.zeros_like(W)
        full[:, chan] = stored
        error = relative_error(W, full, H)
        nb = None
        if bias:
            old = block.vector(f"{name}.bias")
            nb = (old + (W.double() @ m.mean - stored.double() @ m.mean[chan]).float()).to(dt).float()
        for s in block.sites:
            for layer, role in zip(s.layers, s.roles):
                if role in READERS and role.startswith(part):
                    w = block.weight(layer)
                    rows = torch.cat([keep, keep + total]) if role == "mlp.gate_up" else channels.channels_of(keep, len(w) // total)
                    block.rewrite(layer, w[rows], block.vector(f"{layer}.bias")[rows] if block.has_bias(layer) else None)
        block.rewrite(name, stored, nb)
        return LayerReport(name, f"{count} of {total}", error)


def residual_moment(block, site):
    """E[(x - x̂) ẑᵀ]: x the residual stream before this sublayer's output in the original, x̂ here."""
    total = None
    n = 0
    # pre-sublayer residual: attention: block inputs; mlp: block input + attention output
    attn = site.roles[0] == "attn.o"
    ref = block.reference
    o_site = next(s for s in block.sites if s.roles[0] == "attn.o")
    W_o = block.model.weights.read(f"{o_site.layers[0]}.weight").float()
    o_now = block.weight(o_site.layers[0])
    os_in = [b.clone() for b in block._inputs_of(o_site)] if not attn else None
    for i, (start, z) in enumerate(zip(block._starts, block._inputs_of(site))):
        x = ref.inputs.read(start, start + block.batch).float()
        xh = block.inputs.read(start, start + block.batch).float()
        if not attn:
            x = x + ref.sites[o_site.index].read(start, start + block.batch).float() @ W_o.T
            xh = xh + os_in[i].float() @ o_now.T
        d = (x - xh).flatten(0, -2).double()
        zz = z.float().flatten(0, -2).double()
        total = d.T @ zz + (0 if total is None else total)
        n += len(d)
    return total / n
