"""Quantization-aware distillation: weights and the steps of their grids learn together to answer as the original.

In the forward pass every weight is what will be stored, s · (code - z), and gradients pass the rounding as if it were
not there (`compress.core.lsq`: straight-through estimator, learned step sizes). Weights, steps and, on asymmetric
grids, zero points learn at once, from the original's distributions (LLM-QAT, arXiv 2305.17888; EfficientQAT, arXiv
2407.11062). Steps start where a range search puts them, and have a lower learning rate and no decay.

Steps are trained as logarithms relative to where they start, so that one learning rate suits them all and none changes
its sign. Inputs that the scheme rounds are rounded in training too, straight through.

The stage is run twice. As a trainer it leaves an ordinary folder whose weights lie on their grids, and, beside them,
the grids. As a quantizer in the walk behind it takes weights and grids as they are: rounding a number that lies on its
grid gives the code that it had in training, for up to eight bits even where the folder stores it in bfloat16 (its error
is 2⁻⁹ of at most 128 levels, a quarter of a level).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from compress.core import ranges
from compress.core.inputs import round_inputs
from compress.core.lsq import fake_quantize, rounded
from compress.core.metrics import relative_error
from compress.core.scheme import GroupSize, Scheme, parse_scheme
from compress.distill.objective import Objective
from compress.distill.train import Trained, Training, obstacles, train
from compress.errors import naming
from compress.models.anatomy import Anatomy
from compress.models.headers import read_folder
from compress.models.selection import LayerName, select
from compress.models.store import Weights
from compress.stage import LEARNED, LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


class LearnedLinear(nn.Module):
    """A linear layer whose weight is on its grid in every forward pass. `log_scale` 0: steps are where they started."""

    def __init__(self, layer: nn.Linear, scheme: Scheme, range: ranges.Range, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.grid, self.inputs, self.scale_dtype = scheme.weights, scheme.inputs, scale_dtype
        scale, zero_point = ranges.choose(layer.weight.detach().float(), self.grid, scale_dtype, range)
        self.start = scale.float()
        self.log_scale = nn.Parameter(torch.zeros_like(self.start))
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point.float())

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if self.inputs:
            x = round_inputs(x, self.inputs)
        scale = learned_scale(self.start, self.log_scale)
        weight = fake_quantize(self.weight, scale, self.zero_point, self.grid, self.scale_dtype)
        return F.linear(x, weight, self.bias)


def learned_scale(start: Float[Tensor, "out groups"], log_scale: Float[Tensor, "out groups"]) -> Tensor:
    """The scale, before it is rounded to the type it is stored in."""
    return start.to(log_scale.device) * log_scale.exp()


@dataclass(frozen=True)
class QAT:
    """The stage `qat`, as a quantizer."""

    name: ClassVar[str] = "qat"
    role: ClassVar[Role] = "quantizer"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    scheme: str
    group_size: GroupSize = "auto"
    symmetric: bool = True
    range: ranges.Range = "mse"
    """Where steps start; without calibration, so `importance` is none of them."""
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    dataset: str | None = None
    """A named dataset or a local file; null: the calibration text, without what calibration and scoring use of it."""
    objective: Objective = field(default_factory=Objective)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.resolved.weights.kind != "int" or self.resolved.weights.rows != 1:
            raise ValueError(f"scheme={self.scheme}: steps are learned for integer weights, as w4a16 has them")
        if self.resolved.static:
            raise ValueError(f"scheme={self.scheme} has inputs with one scale that calibration fixes; use w8a8 or w4a8")
        if self.range not in ("mse", "minmax"):
            raise ValueError(f"range={self.range!r} must be mse or minmax")
        if self.training.lora_rank:
            raise ValueError(f"lora_rank={self.training.lora_rank}: the weights themselves are trained; leave it out")

    @property
    def resolved(self) -> Scheme:
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    @property
    def trainer(self) -> QuantizationAwareTraining:
        """What this stage is before the walk."""
        return QuantizationAwareTraining(self)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Take the weights in `schemes` for what training made of them."""
        reports = []
        with safe_open(block.model.weights.folder.path / LEARNED, "pt", device=str(block.model.device)) as learned:
            for name, scheme in schemes.items():
                weight, scale = block.weight(name), learned.get_tensor(f"{name}.scale")
                zero_point = None if scheme.weights.symmetric else learned.get_tensor(f"{name}.zero_point")
                tensor = rounded(weight, scale, zero_point, scheme.weights, scale.dtype)
                block.quantize(name, tensor, scheme.inputs)
                reports.append(LayerReport(name, scheme.name, relative_error(weight, tensor.dequantize())))
        return reports


@dataclass(frozen=True)
class QuantizationAwareTraining:
    """The stage `qat`, as a trainer."""

    name: ClassVar[str] = "qat"
    role: ClassVar[Role] = "trainer"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    quantizer: QAT

    @property
    def dataset(self) -> str | None:
        return self.quantizer.dataset

    @property
    def training(self) -> Training:
        return self.quantizer.training

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any], length: int) -> list[str]:
        found = obstacles(self.training, self.quantizer.objective, anatomy, config, length)
        if anatomy.transposed:
            found.append(f"the {anatomy.family} family stores its weights [in, out], for which steps are not learned")
        return found

    def train(
        self,
        student: Path,
        teacher: Path,
        windows: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        work: Path,
        tell: Callable[[str, float, str], None],
    ) -> Trained:
        """Train weights and grids of the model of the folder `student`; its weights come back on their grids."""
        stage, weights = self.quantizer, Weights(read_folder(student))
        scheme = stage.resolved
        dtypes = {name: weights.dtype(f"{name}.weight") for name in _chosen(stage, weights)}
        starts: dict[str, Tensor] = {}

        def prepare(model: nn.Module) -> None:
            for name, dtype in dtypes.items():
                with naming(name):
                    layer = LearnedLinear(model.get_submodule(name), scheme, stage.range, dtype)  # type: ignore[arg-type]
                starts[name] = layer.start.cpu()
                model.set_submodule(name, layer)

        trained = train(student, teacher, windows, held_out, stage.training, stage.objective, work, tell, prepare)
        state, learned = dict(trained.state), {}
        for name, dtype in dtypes.items():
            scale = learned_scale(starts[name], state.pop(f"{name}.log_scale"))
            zero_point = state.pop(f"{name}.zero_point", None)
            tensor = rounded(state[f"{name}.weight"], scale, zero_point, scheme.weights, dtype)
            state[f"{name}.weight"] = tensor.dequantize()
            learned[f"{name}.scale"] = tensor.scale
            if tensor.zero_point is not None:
                learned[f"{name}.zero_point"] = tensor.zero_point
        return replace(trained, state=state, learned=learned)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """There is nothing to do in the trainer's own walk."""
        return []


def _chosen(stage: QAT, weights: Weights) -> list[str]:
    """The layers that the plan gives this stage: all of the blocks, or those it names, without those it ignores."""
    prefix = f"{weights.anatomy.blocks}."
    layers = [
        LayerName(name, role, "Linear")
        for name in (each.removesuffix(".weight") for each in weights.tensors if each.startswith(prefix))
        if (role := weights.anatomy.roles.get(name.removeprefix(prefix).partition(".")[2]))
    ]
    chosen, ignored = (
        {name for names in select(given, layers)[0].values() for name in names}
        for given in (stage.layers, stage.ignore)
    )
    return [layer.name for layer in layers if layer.name not in ignored and (not stage.layers or layer.name in chosen)]
