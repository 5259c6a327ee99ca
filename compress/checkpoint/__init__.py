"""Checkpoint formats: how quantized layers lie on disk, and what config.json says of them.

A format is pure: tensors in, tensors out, no files. `layout` promises names, dtypes and shapes before any
weight is read; `encode` keeps that promise; `decode` is its exact inverse. To add a format, write a file
with a class that honours `Format`, add a line to `FORMATS`, and one to `READERS` if transformers has a name
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.checkpoint.awq import AWQFormat
from compress.checkpoint.bitsandbytes import BitsAndBytes
from compress.checkpoint.compressed_tensors import CompressedTensors, Compression
from compress.checkpoint.dense import Dense
from compress.checkpoint.gptq import GPTQFormat
from compress.checkpoint.layouts import Entries
from compress.checkpoint.sparse_24 import Sparse24, is_sparse
from compress.checkpoint.torchao import TorchAO
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader

__all__ = [
    "FORMATS", "READERS", "AWQFormat", "BitsAndBytes", "CompressedTensors", "Dense", "Format",
    "GPTQFormat", "Options", "Sparse24", "TorchAO", "format_for", "format_of",
]  # fmt: skip


class Format(Protocol):
    """What a checkpoint format answers. A layer's shape is [out, in], `name` its module path."""

    @property
    def name(self) -> str:
        """What recipes call it."""

    @property
    def packs(self) -> bool:
        """Whether codes are stored, so that `decode` gives them back."""

    def problems(self, name: str, kind: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
        """Why this layer cannot be stored, a sentence each; `kind` is the class of its module."""

    def scale_dtype(self, schemes: Collection[Scheme]) -> torch.dtype | None:
        """What scales are rounded to before codes are chosen; None: to the type of each weight."""

    def layout(self, name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> Entries:
        """Tensor name → (safetensors dtype, shape) of what `encode` writes, by arithmetic alone."""

    def metadata(self, entries: Entries, schemes: Collection[Scheme], dtype: str) -> dict[str, str]:
        """What the header of each file says besides its tensors. `entries`: of the whole folder; `dtype`: of the
        original weights, in the words of safetensors."""

    def encode(
        self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None, input_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored tensors of one layer, contiguous. `inputs`: the grid its inputs are rounded to."""

    def decode(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The weight that `encode` was given. Raises ModelError where the tensors do not fit the grid."""

    def shape(self, name: str, tensors: Mapping[str, TensorHeader], grid: Grid) -> tuple[int, ...]:
        """The [out, in] of a layer that is stored quantized."""

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme],
        ignored: Sequence[str],
        rotated: Mapping[str, int] | None = None,
        dtype: str = "F32",
    ) -> dict[str, Any] | None:
        """That entry of config.json, if any; `ignored` names each nn.Linear that stays as it was, `rotated` each whose
        inputs are rotated while the model runs, and the size of the Hadamard matrix. `dtype`: of the original weights,
        in the words of safetensors."""

    def schemes(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
        """Which layers of a folder are stored quantized and how, from that entry and the headers."""

    def rotated_inputs(self, config: Mapping[str, Any], layers: Collection[str]) -> dict[str, int]:
        """What was given as `rotated`. Raises ModelError for rotations that cannot be carried out."""

    def input_scale(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        """The scale of a layer's inputs, where calibration fixed one."""


class Options(Protocol):
    """What a recipe says under `checkpoint`."""

    @property
    def format(self) -> str: ...

    @property
    def compression(self) -> Compression: ...


FORMATS: dict[str, Callable[[Options], Format]] = {
    "compressed-tensors": lambda options: CompressedTensors(options.compression),
    "gptq": lambda options: GPTQFormat(1),
    "gptq_v2": lambda options: GPTQFormat(2),
    "awq": lambda options: AWQFormat(),
    "bitsandbytes": lambda options: BitsAndBytes(),
    "dense": lambda options: Dense(),
    "sparse-24-bitmask": lambda options: Sparse24(),
    "torchao": lambda options: TorchAO(),
}

READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "compressed-tensors": lambda config: CompressedTensors(),
    "gptq": lambda config: GPTQFormat(2 if config.get("checkpoint_format") == "gptq_v2" else 1),
    "awq": lambda config: AWQFormat(),
    "bitsandbytes": lambda config: BitsAndBytes(),
    "torchao": lambda config: TorchAO(),
}
"""By the `quant_method` of a `quantization_config`, which they are given."""


def format_for(options: Options) -> Format:
    """The format a recipe asks for."""
    return FORMATS[options.format](options)


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a folder with this config.json. Raises ModelError where there is no reader for it."""
    if "quantization_config" not in config:
        return Dense()
    quantization = config["quantization_config"] or {}
    if is_sparse(quantization):
        return Sparse24()
    method = quantization.get("quant_method")
    if method not in READERS:
        raise ModelError(
            f"config.json: quant_method {method!r} cannot be read, only {', '.join(READERS)}. "
            "Start from a checkpoint in that format, or from the original model"
        )
    return READERS[method](quantization)
