"""AutoAWQ's GEMM layout, which vLLM, SGLang, transformers (with GPTQModel) and others read: 4 bits only.

    qweight  int32 [in, out/8]      nibble i of a word, counted from the lowest, is output 8c + ORDER[i]
    qzeros   int32 [groups, out/8]  likewise
    scales   float16 [groups, out]

Format: https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Int32, UInt8
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.packing import pack, unpack
from compress.checkpoint.unsigned import (
    Unsigned,
    check_shapes,
    half,
    objections,
    signed_tensor,
    stored_tensors,
    uniform_schemes,
    unsigned,
    unsigned_zeros,
)
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble holds, the lowest first."""


@dataclass(frozen=True)
class AWQFormat(Unsigned):
    """The format."""

    name: ClassVar[str] = "awq"

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """Why this layer cannot be stored, a sentence each."""
        found = objections(name, kind, scheme, self.name, (4,))
        if not found and shape[0] % 8:
            found.append(f"{name}: {shape[0]} outputs are no multiple of 8, as awq needs. Use compressed-tensors")
        return found

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes."""
        rows, columns = shape
        groups = scheme.weights.num_groups(columns)
        return {
            f"{name}.qweight": ("I32", (columns, rows // 8)),
            f"{name}.qzeros": ("I32", (groups, rows // 8)),
            f"{name}.scales": ("F16", (groups, rows)),
        }

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError where a scale is not float16's."""
        return {
            f"{name}.qweight": _interleave(unsigned(tensor.codes, 4).T),
            f"{name}.qzeros": _interleave(unsigned_zeros(tensor).T),
            f"{name}.scales": half(name, tensor.scale).T.contiguous(),
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """What `encode` was given. Raises ModelError where tensors do not fit."""
        words, zeros, scales = stored_tensors(name, tensors)
        columns, rows = len(words), words.shape[1] * 8
        check_shapes(name, self.layout(name, (rows, columns), Scheme(grid), "F16"), tensors)
        return signed_tensor(name, _spread(words, rows).T, _spread(zeros, rows).T, scales, grid)

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """A layer's [out, in]."""
        columns, words = tensors[f"{name}.qweight"].shape
        return words * 8, columns

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What config.json says. Readers want zero points in any case; that they are all alike is ours to know."""
        grid = next(iter(schemes.values())).weights
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": grid.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "sym": grid.symmetric,
            "modules_to_not_convert": list(ignored),
        }

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """Layer → scheme, from anyone's config. Raises ModelError for another layout than GEMM's."""
        version, bits = str(config.get("version", config.get("format", "gemm"))).lower(), config.get("bits", 4)
        if version != "gemm" or bits != 4:
            raise ModelError(
                f"quantization_config: awq of {bits} bits in layout {version!r}; only 4, gemm, can be read"
            )
        return uniform_schemes(config, tensors, bool(config.get("sym", False)))


def _interleave(codes: UInt8[Tensor, "rows out"]) -> Int32[Tensor, "rows words"]:
    eights = codes.contiguous().unflatten(1, (-1, 8))
    return pack(eights[..., list(ORDER)].flatten(1), 4)


def _spread(words: Int32[Tensor, "rows words"], columns: int) -> UInt8[Tensor, "rows out"]:
    inverse = [ORDER.index(place) for place in range(8)]
    return unpack(words.contiguous(), 4, columns).unflatten(1, (-1, 8))[..., inverse].flatten(1)
