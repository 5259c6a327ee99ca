"""A narrower residual stream: one set of coordinates for all layers, and everything that reads or writes them is cut.

`activity` keeps the coordinates that are largest behind the norms, as they are (Minitron, arXiv 2407.14679). `pca`
turns the stream by the eigenvectors of its mean second moment and keeps the leading ones (SliceGPT, arXiv 2401.15024),
with one basis for all layers, so that plain transformers loads what comes out. The scores and the basis are explained
in `compress.core.residual`, what becomes of which tensor in `compress.models.narrowed`.

A turned stream reads and is read by different embeddings: a tied head takes up the last norm's weight and becomes a
matrix of its own, which in a small model of many tokens costs more parameters than the narrower layers save. `activity`
leaves it tied.

With `refit`, the layers behind each norm make up for what is gone. With H = E[y yᵀ] of the outputs of the norm,

    E‖y_gone - B y_kept‖² + λ‖B‖² is least at B = H_gone,kept (H_kept,kept + λI)⁻¹,

and W_kept + W_gone B reads as much of y as can be told from y_kept, whatever W is. Neither paper does that. It knows
the stream as it was, not what becomes of it; a `distill` stage behind this one sees that. A tied head is not refitted.

The model is walked once as it is. Of each norm's H one is in memory at a time, the others in files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.calibrate import BATCH_TOKENS
from compress.calibrate.observers import Moments, MomentsObserver
from compress.calibrate.walk import enter, inputs_of, walk
from compress.core.channels import choose, others, reconstruct
from compress.core.residual import Activity, hidden_scores, principal_basis
from compress.core.scheme import Scheme
from compress.core.widths import rounded_size
from compress.errors import RecipeError, naming
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, read_folder
from compress.models.narrowed import (
    NarrowedWeights,
    fitting_multiple,
    narrowed,
    narrowing_obstacles,
    readers_of,
    width_of,
)
from compress.models.rotated import RotatedWeights, last_norm, untied
from compress.models.store import LazyModel, Weights
from compress.stage import LayerReport, Learned, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Method = Literal["activity", "pca"]


@dataclass(frozen=True)
class Hidden:
    """The stage `hidden`."""

    name: ClassVar[str] = "hidden"
    role: ClassVar[Role] = "view"
    shrinks: ClassVar[bool] = True
    online: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True
    for_inputs: ClassVar[bool] = False
    two_streams: ClassVar[bool] = False

    keep: float = 0.85
    """The share of coordinates that stays."""
    method: Method = "pca"
    refit: bool = True
    """Have the layers that read the stream make up for what is gone."""
    multiple: int = 64
    """The width that is left is a multiple of this."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a share of the coordinates, above 0 and at most 1")
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} must be one of {', '.join(get_args(Method))}")
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple} must be at least 1; kernels like 64")

    def problems(self, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
        return narrowing_obstacles(anatomy, tensors)

    def folder(
        self,
        folder: Folder,
        anatomy: Anatomy,
        tensors: Mapping[str, TensorHeader],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        """Raises RecipeError where no width of the right multiple is near what is asked for."""
        size = self._size(folder, anatomy, width_of(anatomy, tensors))
        return narrowed(untied(folder, anatomy, tensors) if self.method == "pca" else folder, anatomy, size)

    def weights(self, folder: Folder, learned: Mapping[str, Tensor] | None = None) -> Weights:
        learned = learned or {"keep": torch.arange(folder.config["hidden_size"])}
        norms = [name.removesuffix(".share") for name in learned if name.endswith(".share")]
        missing = {norm: (learned[f"{norm}.missing"], float(learned[f"{norm}.share"])) for norm in norms}
        return NarrowedWeights(folder, self._whole(folder.path, learned.get("basis")), learned["keep"], missing)

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        folder = model.weights.folder
        whole = LazyModel(self._whole(folder.path), dtype=model.dtype, device=str(model.device))
        width, size = width_of(whole.anatomy, whole.weights.tensors), folder.config["hidden_size"]
        total, scores = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            for norm, moments, activity in behind_norms(whole, tokens, scratch):
                save_file({"moment": moments.hessian.cpu()}, scratch / f"{norm}.safetensors")
                total += moments.hessian.cpu()
                with naming(norm):
                    scores += hidden_scores([activity]).cpu()
            learned = {"keep": choose(scores, size)}
            if self.method == "pca":
                learned = {"keep": torch.arange(size), "basis": principal_basis(total)[0]}
            for norm, layers in readers_of(whole.anatomy, whole.weights.tensors).items():
                file = scratch / f"{norm}.safetensors"
                if self.refit and layers and size < width and file.exists():
                    moment = _turned(load_file(file)["moment"], learned)
                    weight = whole.weights.read(f"{norm}.weight").double() + whole.anatomy.norm_offset
                    with naming(norm):
                        B, s = explained(moment, weight, learned["keep"])
                    learned |= {f"{norm}.missing": B, f"{norm}.share": s}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        energy = _turned(total, learned).diagonal()
        share = float(energy[learned["keep"]].sum() / energy.sum())
        kept = f"{size} of {width} coordinates, with {share:.1%} of the energy behind norms"
        return Learned(learned, {"kept": kept, "energy": share})

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []

    def _size(self, folder: Folder, anatomy: Anatomy, width: int) -> int:
        wanted, multiple = self.keep * width, fitting_multiple(folder, anatomy, self.multiple)
        size = rounded_size(wanted, width, multiple)
        if wanted < width == size or abs(size - wanted) > multiple / 2:
            heads = " and of the number of heads" if multiple != self.multiple else ""
            raise RecipeError(
                f"hidden: keep={self.keep} of {width} is {wanted:g}, and the nearest width below {width} that is a "
                f"multiple of {self.multiple}{heads} is {size if size < width else 'none'}. Lower multiple"
            )
        return size

    def _whole(self, path: Path, basis: Float[Tensor, "n n"] | None = None) -> Weights:
        """What is cut: the model of a folder, turned if that is the method."""
        stored = Weights(read_folder(path))
        if self.method == "activity":
            return stored
        return RotatedWeights(untied(stored.folder, stored.anatomy, stored.tensors), r2=False, further=basis)


@torch.inference_mode()
def behind_norms(
    model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path
) -> Iterator[tuple[str, Moments, Activity]]:
    """What comes out of each norm that the residual stream is read through, norm by norm, as the model is walked."""
    moments: dict[str, MomentsObserver] = {}
    activities: dict[str, Activity] = {}

    def see(norm: str, outputs: Tensor) -> None:
        moments.setdefault(norm, MomentsObserver(outputs.shape[-1])).update(outputs)
        activities[norm] = activities[norm].including(outputs) if norm in activities else Activity.of(outputs)

    def seen() -> Iterator[tuple[str, Moments, Activity]]:
        for norm in [*moments]:
            yield norm, moments.pop(norm).result(tokens.numel(), norm), activities.pop(norm)

    norms = readers_of(model.anatomy, model.weights.tensors)
    modules = {name: module for name, module in model.module.named_modules() if name in norms}
    hooks = [module.register_forward_hook(lambda _, __, y, norm=norm: see(norm, y)) for norm, module in modules.items()]
    try:
        entrance = enter(model, tokens, inputs_of(0, scratch))
        stream = entrance.inputs
        for _, outputs in walk(model, entrance, stream, scratch, lambda block: None):
            yield from seen()
            stream = outputs
        last = last_norm(model.anatomy, model.weights.tensors)
        batch = max(1, BATCH_TOKENS // stream.length)
        with model.resident([last]):
            for start in range(0, stream.windows, batch):
                modules[last](stream.read(start, start + batch).to(model.device))
        yield from seen()
    finally:
        for hook in hooks:
            hook.remove()


def _turned(moment: Float[Tensor, "n n"], learned: Mapping[str, Tensor]) -> Float[Tensor, "n n"]:
    basis = learned.get("basis")
    return moment if basis is None else basis.T @ moment.to(basis) @ basis


def explained(
    moment: Float[Tensor, "n n"], weight: Float[Tensor, " n"], keep: Int[Tensor, " kept"]
) -> tuple[Float[Tensor, "gone kept"], Float[Tensor, ""]]:
    """What those that stay say of the coordinates that go: B, and the share s of ‖x‖² that stays.

    `moment`: E[y yᵀ] behind a norm that multiplies by `weight`.
    """
    identity = torch.eye(len(moment), dtype=torch.float64)[others(keep, len(moment))]
    energy = (moment.diagonal() / weight.square()).nan_to_num(0.0)  # 0/0 where the norm lets nothing through
    return reconstruct(identity, moment, keep)[0].float(), energy[keep].sum() / energy.sum()
