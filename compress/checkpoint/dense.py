"""dense: the quantized values written out as ordinary weights, for every runtime and every kind of layer.

Nothing is saved on disk and nothing is lost: each weight is `(code - zero_point) · scale` rounded once to
the dtype it would have had anyway. It serves layers that no packed format holds, runtimes without a reader
for one, and comparisons: this is the model that any packed checkpoint of the same codes computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.errors import ModelError
from compress.models.headers import TensorHeader


@dataclass(frozen=True)
class Dense:
    """Writes [out, in] weights in the dtype of their scales; there is nothing to read back but weights."""

    name: ClassVar[str] = "dense"
    packs: ClassVar[bool] = False

    def problems(self, name: str, kind: str, shape: tuple[int, int], grid: Grid) -> list[str]:
        """None: any layer has ordinary weights."""
        return []

    def layout(
        self, name: str, shape: tuple[int, int], grid: Grid, scale_dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes."""
        return {f"{name}.weight": (scale_dtype, shape)}

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The layer's weight."""
        return {f"{name}.weight": tensor.dequantize(tensor.scale.dtype)}

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Raises ModelError: the codes were not kept."""
        raise ModelError(f"{name}: is stored as ordinary weights; their codes on {grid} were not kept")

    def quantization_config(self, grids: Mapping[str, Grid], ignored: Sequence[str]) -> None:
        """None: readers see an ordinary model."""

    def grids(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Grid]:
        """No layer is stored quantized."""
        return {}
