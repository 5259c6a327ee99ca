"""sparse-24-bitmask: 2:4 weights without their zeros, nine sixteenths of the bytes in 16 bits.

Of every four consecutive inputs of an output channel at most two have a weight. Stored are two of the four, in order,
in the weight's own type, and four bits that say which:

    name.compressed   [out, in / 2]       the values
    name.bitmask      [out, ⌈in / 8⌉]     bytes; input i is bit i mod 8, counted from the lowest, of byte ⌊i / 8⌋
    name.shape        [2, 1]              out and in

That is 0.5625 of the dense weight in 16 bits and 0.53125 in float32. Exactly two bits of four are set: where fewer
weights are nonzero, zeros fill up, the first of them first. Zeros that are left out come back as +0.

The tensors, and what config.json says under `sparsity_config`, are those of compressed-tensors up to 0.14, bit for bit.
It is a layout of the past: compressed-tensors 0.15 and transformers with it have no reader any more
(huggingface/transformers#46342), and vLLM, which had kernels for Hopper GPUs, refuses it (vllm-project/vllm#36799).
Told that the method is compressed-tensors, transformers 5.24 would load such a folder all the same, with random numbers
for what it cannot read. So config.json does not say `quant_method`, and transformers stops with an error. Add
`"quant_method": "compressed-tensors"` where an old reader is to have the folder: transformers 4.57 with 0.13 and 0.14
gives the logits of the dense one. `compress.load` and `netsuke eval` read it with the key and without.

Layout: https://github.com/vllm-project/compressed-tensors/pull/235.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from compress.checkpoint.dense import Dense
from compress.checkpoint.layouts import Entries
from compress.core.scheme import Scheme
from compress.core.sparsity import Pattern
from compress.errors import ModelError
from compress.models.headers import TensorHeader
from compress.models.store import DTYPES

NAME = "sparse-24-bitmask"
PATTERN = Pattern(n=2, m=4)
FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))


def layout(name: str, shape: tuple[int, int], dtype: str) -> Entries:
    """Tensor name → (safetensors dtype, shape) of what `encode` writes for a weight [out, in], by arithmetic alone."""
    rows, columns = shape
    return {
        f"{name}.compressed": (dtype, (rows, columns // 2)),
        f"{name}.bitmask": ("U8", (rows, -(-columns // 8))),
        f"{name}.shape": ("I64", (2, 1)),
    }


def encode(name: str, weight: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """The stored tensors of one layer. Raises ValueError where more than two of four weights are not zero."""
    rows, columns = weight.shape
    masks = _exactly_two(_nibbles(weight != 0))
    if crowded := int((masks == 0).sum()):
        raise ValueError(f"{name}: {crowded} of {rows * columns // 4} groups of four weights have more than two that "
                         "are not zero, which 2:4 does not allow. This is a bug: please report it")  # fmt: skip
    return {
        f"{name}.compressed": weight.masked_select(_bits(masks)).view(rows, columns // 2),
        f"{name}.bitmask": _bytes(masks),
        f"{name}.shape": torch.tensor([[rows], [columns]]),
    }


def decode(name: str, tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
    """The weight that `encode` was given. Raises ModelError where a tensor is missing or not what it must be."""
    if f"{name}.weight" in tensors:
        raise ModelError(f"{name}.weight: is stored beside {name}.bitmask, and which of the two counts nobody says")
    missing = [key for key in layout(name, (0, 0), "F32") if key not in tensors]
    if missing:
        raise ModelError(f"{missing[0]}: is missing, and {NAME} needs it")
    values, bitmask, sizes = (tensors[key] for key in layout(name, (0, 0), "F32"))
    if values.dtype not in FLOATS or values.dim() != 2 or values.shape[1] % 2:
        raise ModelError(f"{name}.compressed: is {[*values.shape]} of {values.dtype}, expected floats, [out, in / 2]")
    rows, columns = len(values), 2 * values.shape[1]
    if (told := sizes.flatten()[:3].tolist()) != [rows, columns]:
        raise ModelError(f"{name}.shape: is {told}, {name}.compressed says {[rows, columns]}")
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-columns // 8)):
        expected = f"{[rows, -(-columns // 8)]} of torch.uint8"
        raise ModelError(f"{name}.bitmask: is {[*bitmask.shape]} of {bitmask.dtype}, expected {expected}")
    halves = torch.stack([bitmask & 15, bitmask >> 4], dim=2).view(rows, -1)
    masks, beyond = halves[:, : columns // 4], halves[:, columns // 4 :]
    if beyond.any() or not torch.equal(_exactly_two(masks), masks):
        raise ModelError(f"{name}.bitmask: keeps other than two of four inputs, or some that are not there. "
                         "The file is damaged, download it again")  # fmt: skip
    return values.new_zeros(rows, columns).masked_scatter_(_bits(masks), values)


def sparse_layers(tensors: Iterable[str]) -> frozenset[str]:
    """The layers that are stored so, by the names of all tensors."""
    return frozenset(name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask"))


def shape(name: str, tensors: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    """A layer's [out, in], by the header of its values. Raises ModelError where it has none."""
    values = tensors.get(f"{name}.compressed")
    if values is None or len(values.shape) != 2:
        found = "is missing" if values is None else f"is {[*values.shape]}, expected [out, in / 2]"
        raise ModelError(f"{name}.compressed: {found}")
    return values.shape[0], 2 * values.shape[1]


def problems(name: str, kind: str, pattern: Pattern) -> list[str]:
    """Why the zeros of a pruned layer cannot be left out, a sentence each; `kind` is the class of its module."""
    dense = "Use `checkpoint: {format: dense}`"
    if pattern != PATTERN:
        return [f"{name}: {NAME} leaves out the zeros of 2:4, and not of {pattern.name}. {dense}, or pattern 2:4."]
    if kind != "Linear":
        return [f"{name} is a {kind}, and {NAME} holds nn.Linear only. {dense}, or add the layer to `ignore`."]
    return []


@dataclass(frozen=True)
class Sparse24(Dense):
    """Pruned layers as above, everything else as it is; nothing is quantized beside them."""

    name: ClassVar[str] = NAME
    packs: ClassVar[bool] = True

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """Nothing can be quantized."""
        return [
            f"{name}: {NAME} holds zeros and floats, and not {scheme.name}. Use format compressed-tensors, or dense."
        ]

    def quantization_config(  # type: ignore[override]
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any]:
        """What compressed-tensors says, but not its name; `ignored`: every nn.Linear that is stored as it is."""
        sparsity = {"format": NAME, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": list(ignored)}
        return {"sparsity_config": sparsity}

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """None. Raises ModelError where sparse weights are quantized as well."""
        if config.get("config_groups"):
            raise ModelError(f"quantization_config.config_groups: {NAME} of quantized weights cannot be read")
        return {}


def is_sparse(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that weights are stored so."""
    sparsity = quantization.get("sparsity_config")
    return isinstance(sparsity, Mapping) and sparsity.get("format") == NAME


def _nibbles(kept: Bool[Tensor, "out in"]) -> UInt8[Tensor, "out groups"]:
    """Four bits of each group, the first input lowest."""
    first, second, third, fourth = kept.view(torch.uint8).view(len(kept), -1, 4).unbind(dim=2)
    return first | second << 1 | third << 2 | fourth << 3


def _bits(masks: UInt8[Tensor, "out groups"]) -> Bool[Tensor, "out in"]:
    """The inverse of `_nibbles`."""
    return torch.stack([masks >> place & 1 for place in range(4)], dim=2).view(torch.bool).view(len(masks), -1)


def _bytes(masks: UInt8[Tensor, "out groups"]) -> UInt8[Tensor, "out bytes"]:
    """Two groups to a byte, the first in the lower half."""
    padded = torch.nn.functional.pad(masks, (0, masks.shape[1] % 2))
    return padded[:, ::2] | padded[:, 1::2] << 4


def _exactly_two(masks: UInt8[Tensor, "out groups"]) -> UInt8[Tensor, "out groups"]:
    """Of the bits that are set these two; where there are fewer, the first of the others too; where more, none."""
    filled = []
    for mask in range(16):
        places = sorted(range(4), key=lambda place: not mask >> place & 1)
        filled.append(sum(1 << place for place in places[:2]) if mask.bit_count() <= 2 else 0)
    return torch.tensor(filled, dtype=torch.uint8, device=masks.device)[masks.int()]
