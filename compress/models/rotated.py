"""A model in other coordinates: the same function, its weights rotated as they are read.

Three rotations (QuaRot, arXiv 2404.00456; the names are SpinQuant's, 2405.16406):

- R1 turns the residual stream. What writes into it, embeddings and the last layer of each half, is turned, what reads
  it is turned back, and the weights of the norms in between move into the layers behind them, since a norm commutes
  with a rotation only while it treats all coordinates alike. A tied head is untied: it takes up the last norm's weight.
- R2 turns each head's values, and back in the output projection.
- R4 turns the input of the MLP's last layer, behind the activation function where no weight could take it up: the
  weights are turned, and so must be the inputs while the model runs (`online`). Its matrix is Sylvester's, in runs of
  the largest power of two that divides the width.

LayerNorms keep working as they are under a centred R1 (`compress.core.hadamard`). A norm's bias moves into those of
the layers behind it; where they have none it stays, turned, divided by the norm's weight.

Everything is computed in float64 and rounded once, to the type that the tensor is stored in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.hadamard import Rotation, hadamard, largest_power_of_two, random_rotation
from compress.models.anatomy import Anatomy, Site
from compress.models.headers import Folder, TensorHeader
from compress.models.store import Weights

Step = Callable[[Tensor], Tensor]
"""What is done to a tensor in float64; a weight comes as [out, in]."""
READERS = frozenset({"attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.gate", "mlp.up", "mlp.gate_up"})
"""Roles that read the residual stream."""
WRITERS = frozenset({"attn.o", "mlp.down"})
"""Roles that write into it."""


class RotatedWeights(Weights):
    """The tensors of an `untied` folder, rotated.

    `further`: an orthogonal matrix [hidden, hidden], float64, that R1 goes on to turn by. Raises ValueError where there
    are `obstacles`.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        r1: bool = True,
        r2: bool = True,
        r4: bool = False,
        seed: int = 0,
        further: Float[Tensor, "n n"] | None = None,
    ) -> None:
        super().__init__(folder)
        self._steps: dict[str, list[Step]] = defaultdict(list)
        """Tensor → what is done to it, in this order."""
        if r1:
            self._turn_residual_stream(seed, further)
        if r2:
            self._turn_values(seed)
        if r4:
            self._turn_inputs_of_down()

    def read(self, name: str) -> Tensor:
        stored = super().read(name)
        if name not in self._steps:
            return stored
        turned = self.anatomy.transposed and name.startswith(f"{self.anatomy.blocks}.") and stored.dim() == 2
        value = stored.double().T if turned else stored.double()
        for step in self._steps[name]:
            value = step(value)
        return (value.T if turned else value).to(stored.dtype).contiguous()

    # ---- R1 ----------------------------------------------------------------------------------------------------

    def _turn_residual_stream(self, seed: int, further: Float[Tensor, "n n"] | None) -> None:
        problems = obstacles(self.anatomy, self.tensors)
        if problems:
            raise ValueError(problems[0])
        width = self.tensors[f"{self.anatomy.embedding}.weight"].shape[-1]
        generator = torch.Generator().manual_seed(seed)
        rotation = random_rotation(width, generator, centred=not has_rms_norms(self.folder.config))

        def turn(x: Tensor) -> Tensor:
            return rotation.apply(x) if further is None else rotation.apply(x) @ further

        for module in self.anatomy.before:
            self._do(f"{module}.weight", turn)
        readers: dict[str, list[str]] = defaultdict(list)
        for site, prefix in self._sites():
            for layer, role in site.roles.items():
                if role in READERS:
                    readers[f"{prefix}{site.source}"].append(f"{prefix}{layer}")
                elif role in WRITERS:
                    self._do(f"{prefix}{layer}.weight", _of_rows(turn))
                    self._do(f"{prefix}{layer}.bias", turn)
        assert self.anatomy.head, "it would be an obstacle"
        readers[last_norm(self.anatomy, self.tensors)].append(self.anatomy.head)
        for norm, layers in readers.items():
            self._fold(norm, layers, turn)

    def _fold(self, norm: str, layers: Sequence[str], turn: Step) -> None:
        """Move a norm's weight into the layers behind it, and turn those."""
        present = [layer for layer in layers if f"{layer}.weight" in self.tensors]
        carried = all(f"{layer}.bias" in self.tensors for layer in present)

        def gain() -> Tensor:
            return super(RotatedWeights, self).read(f"{norm}.weight").double() + self.anatomy.norm_offset

        def shift() -> Tensor:
            return super(RotatedWeights, self).read(f"{norm}.bias").double()

        for layer in present:
            self._do(f"{layer}.weight", lambda weight: turn(weight * gain()))
            if carried and f"{norm}.bias" in self.tensors:
                self._do(f"{layer}.bias", self._carrying(layer, shift))
        self._do(f"{norm}.weight", lambda weight: torch.full_like(weight, 1 - self.anatomy.norm_offset))
        self._do(f"{norm}.bias", lambda bias: torch.zeros_like(bias) if carried else turn(bias / gain()))

    def _carrying(self, layer: str, shift: Callable[[], Tensor]) -> Step:
        """What a bias becomes that takes up a norm's."""
        return lambda bias: bias + self._stored(layer) @ shift()

    # ---- R2 and R4 ---------------------------------------------------------------------------------------------

    def _turn_values(self, seed: int) -> None:
        config = self.folder.config
        head_dim = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
        generator = torch.Generator().manual_seed(seed + 1)
        for site, prefix in self._sites():
            values = f"{prefix}{site.source}"
            header = self.tensors.get(f"{values}.weight")
            if "attn.o" not in site.roles.values() or not header or len(header.shape) != 2:
                continue
            turn = _in_heads(random_rotation(head_dim, generator), head_dim)
            self._do(f"{values}.weight", _of_rows(turn))
            self._do(f"{values}.bias", turn)
            for layer in site.layers:
                self._do(f"{prefix}{layer}.weight", turn)

    def _turn_inputs_of_down(self) -> None:
        for site, prefix in self._sites():
            for layer, role in site.roles.items():
                name = f"{prefix}{layer}"
                if role == "mlp.down" and f"{name}.weight" in self.tensors:
                    width = self.tensors[f"{name}.weight"].shape[0 if self.anatomy.transposed else 1]
                    size = self.online[name] = largest_power_of_two(width)
                    self._do(f"{name}.weight", partial(hadamard, size=size))

    # ---- how ---------------------------------------------------------------------------------------------------

    def _sites(self) -> Iterator[tuple[Site, str]]:
        """Every site of every block, with the block's prefix."""
        start = f"{self.anatomy.blocks}."
        indices = {name.removeprefix(start).split(".")[0] for name in self.tensors if name.startswith(start)}
        for index in sorted(indices, key=int):
            for site in self.anatomy.sites:
                yield site, f"{start}{index}."

    def _do(self, name: str, step: Step) -> None:
        if name in self.tensors:
            self._steps[name].append(step)

    def _stored(self, layer: str) -> Float[Tensor, "out in"]:
        weight = super().read(f"{layer}.weight").double()
        return weight.T if self.anatomy.transposed and layer.startswith(f"{self.anatomy.blocks}.") else weight


def _of_rows(turn: Step) -> Step:
    """Turns the output of a layer where `turn` turns inputs."""
    return lambda weight: turn(weight.T).T


def _in_heads(rotation: Rotation, size: int) -> Step:
    return lambda x: rotation.apply(x.unflatten(-1, (-1, size))).flatten(-2)


def untied(folder: Folder, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> Folder:
    """The folder with a head of its own, read from the embedding's bytes where it had none."""
    config = {**folder.config, "tie_word_embeddings": False}
    if not anatomy.head or f"{anatomy.head}.weight" in tensors:
        return replace(folder, config=config)
    stored_as = {module: stored for stored, module in anatomy.renamed.items()}
    name = f"{stored_as.get(anatomy.head, anatomy.head)}.weight"
    head = replace(tensors[f"{anatomy.embedding}.weight"], name=name)
    return replace(folder, config=config, tensors={**folder.tensors, name: head})


def obstacles(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Why the residual stream of this model cannot be turned, a sentence each; none where it can."""
    if anatomy.head is None:
        return [f"the {anatomy.family} model ends without a head that could turn the residual stream back"]
    width = tensors[f"{anatomy.embedding}.weight"].shape[-1]
    prefix = f"{anatomy.blocks}.0."
    sources = {site.source for site in anatomy.sites if READERS & set(site.roles.values())}
    norms = {
        name.removeprefix(prefix).removesuffix(".weight")
        for name, header in tensors.items()
        if name.startswith(prefix) and name.endswith(".weight") and header.shape == (width,)
    }
    others = sorted(norm for norm in norms - sources if not norm.endswith(("q_norm", "k_norm")))
    odd = [name for name in anatomy.before if tensors.get(f"{name}.weight") and not _embeds(tensors, name, width)]
    found = []
    if not sources <= norms:
        found.append("a layer reads the residual stream through a norm that feeds the stream too, or through none")
    if anatomy.mixture:
        found.append("experts and their router read the residual stream, and are not turned")
    elif others:
        found.append(f"{others[0]} scales what is added to the residual stream")
    if odd:
        found.append(f"{odd[0]} stands between the embedding and the residual stream")
    if not last_norm(anatomy, tensors):
        found.append("no norm stands before the head")
    return [f"{anatomy.family}: R1 would change the function, because {reason}" for reason in found]


def _embeds(tensors: Mapping[str, TensorHeader], module: str, width: int) -> bool:
    shape = tensors[f"{module}.weight"].shape
    return len(shape) == 2 and shape[1] == width and not module.endswith("project_in")


def last_norm(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> str:
    """The norm before the head; empty where something else stands there too, or nothing."""
    present = [name for name in anatomy.after if f"{name}.weight" in tensors]
    return present[0] if len(present) == 1 and len(tensors[f"{present[0]}.weight"].shape) == 1 else ""


def has_rms_norms(config: Mapping[str, Any]) -> bool:
    """Whether norms look at lengths only. Where this is not certain, a rotation had better keep means."""
    return "rms_norm_eps" in config
