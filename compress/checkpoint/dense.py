"""dense: the quantized values written out as ordinary weights, for every runtime and every kind of layer.

Nothing is saved on disk and nothing is lost: each weight is `(code - zero_point) · scale` rounded once to
the dtype it would have had anyway. It serves layers that no packed format holds, runtimes without a reader
for one, and comparisons: this is the model that any packed checkpoint of the same codes computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.plain import Plain
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader


@dataclass(frozen=True)
class Dense(Plain):
    """Writes [out, in] weights in the dtype of their scales; there is nothing to read back but weights."""

    name: ClassVar[str] = "dense"
    packs: ClassVar[bool] = False

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """Any layer has ordinary weights; what would be done to its inputs has no place to be said."""
        if scheme.inputs is None:
            return []
        return [
            f"{name}: an ordinary folder cannot say that {scheme.name} rounds inputs. Use a scheme that ends in a16."
        ]

    def scale_dtype(self, schemes: Collection[Scheme]) -> None:
        """None: codes are not kept, and weights keep their type."""

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes."""
        return {f"{name}.weight": (scale_dtype, shape)}

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The layer's weight."""
        return {f"{name}.weight": tensor.dequantize(tensor.scale.dtype)}

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Raises ModelError: the codes were not kept."""
        raise ModelError(f"{name}: is stored as ordinary weights; their codes on {grid} were not kept")

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        return tensors[f"{name}.weight"].shape

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> None:
        """None: readers see an ordinary model."""

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """No layer is stored quantized."""
        return {}
