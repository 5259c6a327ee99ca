"""bitsandbytes: the checkpoint that QLoRA starts from, for `from_pretrained` of transformers.

A folder holds layers of one kind: NF4 (`compress.checkpoint.bitsandbytes_nf4`), or int8 with one scale per output
channel (`compress.checkpoint.bitsandbytes_int8`). `config.json` says which, and names the layers that stay as they
were; all other nn.Linear are taken to be quantized. How a layer is stored is told by the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.checkpoint.bitsandbytes_int8 import INT8, SCALE, SCALE_DTYPE, decode_int8, encode_int8, int8_entries
from compress.checkpoint.bitsandbytes_nf4 import STATE, decode_nf4, encode_nf4, nf4_entries, read_state
from compress.checkpoint.layouts import Entries
from compress.checkpoint.plain import Plain
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import NF4, Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES, read_tensor

SCHEME_BY_LEAF = {STATE: Scheme(NF4), SCALE: Scheme(INT8)}
"""A tensor that only layers of one scheme have, by the last part of its name."""
THRESHOLD = 6.0
"""Inputs as large as this are not rounded to int8, nor are others of their column; bitsandbytes' own choice."""


@dataclass(frozen=True)
class BitsAndBytes(Plain):
    """Writes NF4 with plain scales and int8; reads NF4 with nested scales too."""

    name: ClassVar[str] = "bitsandbytes"
    packs: ClassVar[bool] = True

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """What speaks against storing this layer, a sentence each; `kind` is the class of its module."""
        if scheme.name == "w8a16" and scheme != Scheme(INT8):
            return [
                f"{name}: bitsandbytes holds w8a16 with one scale per output channel and no zero points. "
                "Use `group_size: null, symmetric: true`, or `checkpoint: {format: compressed-tensors}`"
            ]
        if scheme not in SCHEME_BY_LEAF.values():
            why = " (it rounds inputs to int8 by a rule of its own)" if scheme.name == "w8a8" else ""
            return [
                f"{name}: bitsandbytes holds nf4 and w8a16, and not {scheme.name}{why}. Use `scheme: nf4` or "
                "`scheme: w8a16, group_size: null`, or `checkpoint: {format: compressed-tensors}`"
            ]
        if kind != "Linear":
            return [
                f"{name} is a {kind}, and bitsandbytes holds nn.Linear only. "
                "Use `checkpoint: {format: dense}`, or add the layer to `ignore`."
            ]
        return []

    def scale_dtype(self, schemes: Collection[Scheme]) -> torch.dtype | None:
        """bfloat16 for int8, whatever the weights are."""
        return SCALE_DTYPE if Scheme(INT8) in schemes else None

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes, by arithmetic alone."""
        normal = scheme.weights.kind == "normal"
        entries = nf4_entries(shape, DTYPES[scale_dtype]) if normal else int8_entries(shape)
        return {f"{name}.{leaf}": entry for leaf, entry in entries.items()}

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors of one layer. Raises ModelError where they would not be read back as they are."""
        try:
            stored = (encode_nf4 if tensor.grid.kind == "normal" else encode_int8)(tensor)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None
        return {f"{name}.{leaf}": value for leaf, value in stored.items()}

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The weight that `encode` was given. Raises ModelError where a tensor is missing or not what it must be."""
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        try:
            return (decode_nf4 if grid.kind == "normal" else decode_int8)(stored)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """A layer's [out, in]; of NF4 its state says so."""
        if grid.kind == "int":
            return tensors[f"{name}.weight"].shape
        try:
            return read_state(read_tensor(tensors[f"{name}.{STATE}"]))[0]
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What config.json says of these layers; without a dtype, transformers multiplies NF4 in float32."""
        int8 = Scheme(INT8) in schemes.values()
        own = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        }
        return {
            "quant_method": self.name,
            "load_in_4bit": not int8,
            "load_in_8bit": int8,
            **({"llm_int8_threshold": THRESHOLD} if int8 else own),
            "llm_int8_skip_modules": list(ignored),
        }

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """The layers that are stored so. Raises ModelError where none is, as with FP4."""
        schemes = {
            name.removesuffix(f".{leaf}"): scheme
            for name in tensors
            for leaf, scheme in SCHEME_BY_LEAF.items()
            if name.endswith(f".{leaf}")
        }
        if not schemes:
            raise ModelError(
                "quantization_config: of bitsandbytes only nf4 and int8 can be read, and no layer is stored so"
            )
        return schemes
