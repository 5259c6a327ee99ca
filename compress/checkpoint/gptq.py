"""GPTQ's layout, which vLLM, SGLang, transformers (with optimum and GPTQModel) and others read.

    qweight  int32 [in·b/32, out]      one bit stream per output, along the inputs
    qzeros   int32 [groups, out·b/32]  one bit stream per group; format v1 stores zero - 1, v2 zero
    scales   float16 [groups, out]
    g_idx    int32 [in]                the group of each input, here always input // group size

In v1 a zero of 0 has no faithful form, as readers disagree on whether the sum wraps, so asymmetric grids are refused
there and go into v2. Format: AutoGPTQ and https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int32
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.packing import num_words, pack, unpack
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

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQFormat(Unsigned):
    """`version` 1 or 2 of it."""

    version: Literal[1, 2] = 2

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """Why this layer cannot be stored, a sentence each."""
        rows, columns = shape
        grid = scheme.weights
        found = objections(name, kind, scheme, self.name, BITS)
        if not found and (rows * grid.bits % 32 or columns * grid.bits % 32):
            found.append(
                f"{name}: {rows} outputs and {columns} inputs of {grid.bits} bits do not fill whole 32-bit words, as "
                f"{self.name} needs. Use compressed-tensors, or add it to 'ignore'"
            )
        if not found and self.version == 1 and not grid.symmetric:
            found.append(f"{name}: gptq (v1) cannot hold every zero point. Use gptq_v2, or symmetric: true")
        return found

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes."""
        (rows, columns), grid = shape, scheme.weights
        groups = grid.num_groups(columns)
        return {
            f"{name}.qweight": ("I32", (num_words(columns, grid.bits), rows)),
            f"{name}.qzeros": ("I32", (groups, num_words(rows, grid.bits))),
            f"{name}.scales": ("F16", (groups, rows)),
            f"{name}.g_idx": ("I32", (columns,)),
        }

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError where a scale is not float16's."""
        bits, columns = tensor.grid.bits, tensor.shape[1]
        zeros = unsigned_zeros(tensor) - (1 if self.version == 1 else 0)
        return {
            f"{name}.qweight": pack(unsigned(tensor.codes, bits), bits).T.contiguous(),
            f"{name}.qzeros": pack(zeros.T.contiguous(), bits),
            f"{name}.scales": half(name, tensor.scale).T.contiguous(),
            f"{name}.g_idx": _groups(columns, tensor.grid),
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """What `encode` was given. Raises ModelError where tensors do not fit, or columns have another order."""
        words, zeros, scales = stored_tensors(name, tensors)
        columns, rows = len(words) * 32 // grid.bits, words.shape[1]
        check_shapes(
            name, self.layout(name, (rows, columns), Scheme(grid), "F16"), tensors, optional=(f"{name}.g_idx",)
        )
        order = tensors.get(f"{name}.g_idx")
        if order is not None and not torch.equal(order, _groups(columns, grid)):
            raise ModelError(
                f"{name}.g_idx: groups are not runs of neighbouring inputs (desc_act), which no kernel of ours reads. "
                "Quantize again with act_order: static"
            )
        codes = unpack(words.T.contiguous(), grid.bits, columns)
        unsigned = unpack(zeros, grid.bits, rows).T.contiguous() + (1 if self.version == 1 else 0)
        return signed_tensor(name, codes, unsigned, scales, grid)

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """A layer's [out, in]."""
        words, rows = tensors[f"{name}.qweight"].shape
        return rows, words * 32 // grid.bits

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What config.json says; layers inside the blocks that stay as they were are excluded by name."""
        grid = next(iter(schemes.values())).weights
        inside = [name for name in ignored if "." in name]
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "desc_act": False,
            "sym": grid.symmetric,
            "lm_head": False,
            "true_sequential": True,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["netsuke"]},
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in inside}} if inside else {}),
        }

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """Layer → scheme, from anyone's config. Raises ModelError where layers have grids of their own."""
        overrides = [key for key in config.get("dynamic") or {} if not key.startswith("-:")]
        if overrides:
            raise ModelError(f"quantization_config.dynamic: {overrides[0]!r} gives layers other grids; cannot be read")
        if config.get("bits") not in BITS:
            raise ModelError(f"quantization_config.bits: {config.get('bits')!r}, expected one of {BITS}")
        return uniform_schemes(config, tensors, bool(config.get("sym", True)))


def _groups(columns: int, grid: Grid) -> Int32[Tensor, " in"]:
    return torch.arange(columns, dtype=torch.int32) // (grid.group_size or columns)
