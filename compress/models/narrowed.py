"""A model with a narrower residual stream: some of its coordinates are left out of every tensor as it is read.

Embeddings lose columns, the last layer of each half loses rows, the layers behind norms lose columns, and the norms in
between lose entries. A norm over k of n coordinates divides by another root mean square, which its weight and its ε
make up for (`compress.core.residual`). Which coordinates stay is not decided here, and they may be those of a turned
stream: the tensors that are cut can be `RotatedWeights`.

The layers behind a norm can be told what the coordinates that went are in the mean, given those that stay, y_gone ≈ B
y_kept, and which share s of ‖x‖² these hold. Then W becomes W_kept + W_gone B, and the norm's weight grows by √(s n/k)
and not √(n/k). A head that is tied to the embedding loses what the embedding loses, and its norm is as for s = 1.

Heads keep their number and their width, which config.json then has to say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from compress.core.channels import others
from compress.core.kv import heads_of
from compress.core.residual import norm_gain
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, canonical
from compress.models.rotated import READERS, WRITERS, last_norm, obstacles
from compress.models.store import Weights

SCALED_EMBEDDINGS = frozenset({"gemma"})
"""Families that multiply embeddings by the square root of the width."""
WHOLE_HEADS = frozenset({"llama"})
"""Families whose config takes no width but a multiple of the number of heads, whatever the width of a head."""

RMS_NORM_EPS = 1e-6
"""What transformers takes where config.json does not say."""


class NarrowedWeights(Weights):
    """The tensors of a `narrowed` folder.

    `whole`: those that are cut, of the same names. `keep`: the coordinates that stay, ascending. `missing`: norm → B
    and s; the layers behind other norms are cut and no more.
    """

    def __init__(
        self,
        folder: Folder,
        whole: Weights,
        keep: Int[Tensor, " kept"],
        missing: Mapping[str, tuple[Float[Tensor, "gone kept"], float]],
    ) -> None:
        super().__init__(folder)
        width = width_of(self.anatomy, whole.tensors)
        readers = readers_of(self.anatomy, whole.tensors)
        self._whole, self._keep, self._gone = whole, keep, others(keep, width)
        self._axes = stream_axes(self.anatomy, whole.tensors)
        self._missing = {f"{layer}.weight": missing[norm][0] for norm in missing for layer in readers[norm]}
        gain, last = norm_gain(width, len(keep)), last_norm(self.anatomy, whole.tensors)
        shares = {norm: share for norm, (_, share) in missing.items() if readers[norm]}
        self._gains = {f"{norm}.weight": gain * math.sqrt(shares.get(norm, 1.0)) for norm in readers}
        if self.anatomy.family in SCALED_EMBEDDINGS:
            # The factor has become smaller. A tied head takes over what makes up for that, so its norm gives way.
            self._gains |= {f"{self.anatomy.embedding}.weight": gain, f"{self.anatomy.head}.weight": gain}
            self._gains[f"{last}.weight"] /= gain

    def read(self, name: str) -> Tensor:
        stored = self._whole.read(name)
        if name not in self._axes:
            return stored
        kept = stored.index_select(self._axes[name], self._keep).double()
        if name in self._missing:
            kept += stored[:, self._gone].double() @ self._missing[name].double()
        if name in self._gains:
            offset = self.anatomy.norm_offset if stored.dim() == 1 else 0.0
            kept = (kept + offset) * self._gains[name] - offset
        return kept.to(stored.dtype)


def narrowed(folder: Folder, anatomy: Anatomy, size: int) -> Folder:
    """The folder with a residual stream of this width: its config and its headers."""
    tensors = canonical(folder.tensors, anatomy)
    config, width = folder.config, width_of(anatomy, tensors)
    cut = dict(folder.tensors)
    for name, axis in stream_axes(anatomy, tensors).items():
        header = tensors[name]
        shape = (*header.shape[:axis], size, *header.shape[axis + 1 :])
        cut[header.name] = replace(header, shape=shape)
    changed = {
        "hidden_size": size,
        "head_dim": heads_of(config)[1],
        "rms_norm_eps": config.get("rms_norm_eps", RMS_NORM_EPS) * width / size,
    }
    return replace(folder, config={**config, **changed}, tensors=cut)


def fitting_multiple(folder: Folder, anatomy: Anatomy, multiple: int) -> int:
    """The least multiple of `multiple` whose multiples can all be the width of this model's stream."""
    return math.lcm(multiple, folder.config["num_attention_heads"]) if anatomy.family in WHOLE_HEADS else multiple


def narrowing_obstacles(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Why the residual stream of this model cannot be made narrower, a sentence each; none where it can."""
    found = [f"{problem}. A stream is cut where R1 turns it" for problem in obstacles(anatomy, tensors)]
    centred = [norm for norm in readers_of(anatomy, tensors) if f"{norm}.bias" in tensors]
    if centred and not found:
        found.append(
            f"{anatomy.family}: {centred[0]} is a LayerNorm, which takes the mean of all coordinates, and transformers "
            "makes heads of this family as wide as hidden_size says. Only streams behind RMSNorms can be cut"
        )
    return found


def readers_of(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> dict[str, list[str]]:
    """Norm → the layers that read the stream through it; of the last norm the head, unless it is tied."""
    readers: dict[str, list[str]] = defaultdict(list)
    sources = {layer: site.source for site in anatomy.sites for layer, role in site.roles.items() if role in READERS}
    for name in tensors:
        prefix, local = _parts(name, anatomy)
        if name.endswith(".weight") and sources.get(local):
            readers[f"{prefix}{sources[local]}"].append(f"{prefix}{local}")
    head = [anatomy.head] if anatomy.head and f"{anatomy.head}.weight" in tensors else []
    return {**readers, last_norm(anatomy, tensors): head}


def stream_axes(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Tensor → which of its axes goes along the residual stream."""
    readers = readers_of(anatomy, tensors)
    columns = {*anatomy.before, *(layer for layers in readers.values() for layer in layers)}
    axes = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if module in readers or anatomy.roles.get(_parts(name, anatomy)[1]) in WRITERS:
            axes[name] = 0
        elif module in columns and leaf == "weight":
            axes[name] = 1
    return axes


def width_of(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> int:
    return tensors[f"{anatomy.embedding}.weight"].shape[1]


def _parts(name: str, anatomy: Anatomy) -> tuple[str, str]:
    """The prefix of a tensor's block and its module inside it; both empty outside the blocks."""
    start = f"{anatomy.blocks}."
    if not name.startswith(start):
        return "", ""
    index, _, local = name.removeprefix(start).partition(".")
    return f"{start}{index}.", local.rpartition(".")[0]
