"""The weights of a compressed folder, dequantized, or given their zeros back, one layer at a time.

It reads like any other folder, so whatever streams an ordinary model streams a compressed one: verification and
scoring work on the files that ship, with no second code path and never more than a block in memory. What the folder's
adapter has for a layer is in its weight.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoint import Format, format_of, sparse_24
from compress.checkpoint.adapter import open_adapter
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Scheme
from compress.errors import ModelError
from compress.models.headers import Folder, read_folder
from compress.models.store import LazyModel, Weights, read_tensor


class QuantizedWeights(Weights):
    """Tensors of a folder whose config.json has a `quantization_config` that netsuke reads."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self.format: Format = format_of(folder.config)
        config = folder.config["quantization_config"]
        self.schemes: dict[str, Scheme] = self.format.schemes(config, self.tensors)
        self.sparse = sparse_24.sparse_layers(self.tensors) if self.format.name == sparse_24.NAME else frozenset()
        """Layers whose zeros are not in the files."""
        linear = [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]
        self.online = self.format.rotated_inputs(config, [*self.schemes, *linear])
        self.adapter = open_adapter(folder.path)
        self._check_adapter()

    def __contains__(self, name: str) -> bool:
        layer = name.removesuffix(".weight")
        return layer in self.schemes or layer in self.sparse or super().__contains__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        layer = name.removesuffix(".weight")
        if layer in self.sparse:
            return sparse_24.shape(layer, self.tensors)
        if layer not in self.schemes:
            return super().shape(name)
        return self.format.shape(layer, self.tensors, self.schemes[layer].weights)

    def read(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer in self.sparse:
            return sparse_24.decode(layer, self._stored(layer))
        if layer not in self.schemes:
            return super().read(name)
        weight = self.quantized(layer).dequantize(torch.float32)
        if layer in self.adapter.products:
            A, B = self.adapter.read(layer)
            weight += A.float() @ B.float()
        return weight

    def quantized(self, layer: str) -> QuantizedTensor:
        """One layer's codes, scales and zero points."""
        return self.format.decode(layer, self._stored(layer), self.schemes[layer].weights)

    def input_scale(self, layer: str) -> Tensor | None:
        """The scale of one layer's inputs, where calibration fixed one."""
        stored = {
            name: read_tensor(header) for name, header in self.tensors.items() if name.startswith(f"{layer}.input")
        }
        return self.format.input_scale(layer, stored, self.schemes[layer])

    def _stored(self, layer: str) -> dict[str, Tensor]:
        return {name: read_tensor(header) for name, header in self.tensors.items() if name.startswith(f"{layer}.")}

    def _check_adapter(self) -> None:
        """Raises ModelError for a product that cannot be added to a layer stored quantized here."""
        for layer, (rows, _, columns) in self.adapter.products.items():
            where = f"{self.adapter.file}: {layer}"
            if layer not in self.schemes:
                raise ModelError(f"{where} has a product, the checkpoint stores no such quantized layer")
            if self.shape(f"{layer}.weight") != (rows, columns):
                stored = list(self.shape(f"{layer}.weight"))
                raise ModelError(f"{where} has a product of [{rows}, {columns}], the checkpoint a weight of {stored}")
            if self.schemes[layer].inputs or layer in self.online:
                raise ModelError(f"{where} has a product of inputs as they come, the checkpoint rounds or rotates them")


def open_weights(path: Path) -> Weights:
    """The weights of a folder, ordinary or quantized."""
    folder = read_folder(path)
    return QuantizedWeights(folder) if "quantization_config" in folder.config else Weights(folder)


def open_model(path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LazyModel:
    """A folder, ordinary or quantized, as a model whose weights stay on disk. Inputs are rounded as the folder says."""
    weights = open_weights(path)
    model = LazyModel(weights, dtype=dtype, device=device)
    if isinstance(weights, QuantizedWeights):
        for layer, scheme in weights.schemes.items():
            if scheme.inputs:
                model.round_inputs(layer, scheme.inputs, weights.input_scale(layer))
    return model
