"""ONNX checkpoints: a quantized decoder as a graph that onnxruntime runs, its codes as they are.

`export` writes the graph and its weights and reads them back from disk; `load` gives back the quantized layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from compress.checkpoint.onnx_blocks import Operands, from_operands, problem, to_operands
from compress.checkpoint.onnx_file import GraphWriter, Node, ONNXFile, onnx_package
from compress.checkpoint.onnx_graph import OPERANDS, Decoder, unsupported
from compress.checkpoint.weights import QuantizedWeights
from compress.core.qtensor import QuantizedTensor
from compress.errors import ModelError, VerificationError
from compress.models.store import LazyModel

SETTINGS = ("K", "N", "bits", "block_size")


def problems(weights: QuantizedWeights) -> list[str]:
    """Why a folder cannot be such a graph, a sentence each. Raises RequestError where the package onnx is missing."""
    onnx_package()
    reasons: dict[str, str] = {}
    for layer, scheme in weights.schemes.items():
        rows, columns = weights.shape(f"{layer}.weight")
        if reason := problem(layer, (rows, columns), scheme):
            reasons.setdefault(reason.removeprefix(layer), reason)
    return [*unsupported(LazyModel(weights, dtype=torch.float32)), *reasons.values()]


def export(weights: QuantizedWeights, folder: Path, *, int8_inputs: bool = False) -> None:
    """Write a model for which there are no `problems`. Raises VerificationError unless it reads back as it was.

    onnxruntime multiplies in float32, or rounds the inputs of quantized layers to int8 where it may.
    """
    operands = {layer: partial(_operands, weights, layer) for layer in weights.schemes}
    model = LazyModel(weights, dtype=torch.float32)
    with GraphWriter(folder) as graph:
        Decoder(model, graph, operands, int8_inputs).write()
    written = CodesFile(folder)
    for layer in weights.schemes:
        check_same(layer, weights.quantized(layer), written.quantized(layer), written.path)
    for name in written.tensors.keys() & {name for name, _ in model.module.named_parameters()}:
        held = written.read(name)
        if not held.equal(weights.read(name).to(held.dtype)):
            raise VerificationError(f"{written.path}: {name} does not read back as it was. Please report this")


def load(folder: Path) -> dict[str, QuantizedTensor]:
    """Every quantized layer of such a folder. Raises ModelError where it is damaged."""
    file = CodesFile(folder)
    return {layer: file.quantized(layer) for layer in file.layers}


def check_same(layer: str, before: QuantizedTensor, after: QuantizedTensor, where: Path) -> None:
    """Raises VerificationError unless both are the same codes that stand for the same numbers."""
    if not (before.codes.equal(after.codes) and before.dequantize().equal(after.dequantize())):
        raise VerificationError(f"{where}: {layer} does not decode to what it was. Please report this")


class CodesFile(ONNXFile):
    """An ONNX file whose quantized layers are read one at a time."""

    @property
    def layers(self) -> dict[str, Node]:
        """Layer → its node, known by the name of its codes."""
        products = [node for node in self.nodes if node.operator == "MatMulNBits"]
        for node in products:
            if len(node.inputs) not in (3, 4):
                raise ModelError(f"{self.path}: {node.name} has {len(node.inputs)} inputs, 3 or 4 are expected")
        return {node.inputs[1].removesuffix(f".{OPERANDS[0]}"): node for node in products}

    def quantized(self, layer: str) -> QuantizedTensor:
        """One layer's codes, scales and zero points."""
        if layer not in self.layers:
            raise ModelError(f"{self.path}: {layer} is no MatMulNBits")
        node = self.layers[layer]
        columns, rows, bits, block = (node.settings.get(name, 0) for name in SETTINGS)
        codes, scales, *zeros = (self.read(name) for name in node.inputs[1:])
        try:
            if len(codes) != rows:
                raise ValueError(f"codes have {len(codes)} rows, N={rows}")
            return from_operands(Operands(columns, bits, block, codes, scales, zeros[0] if zeros else None))
        except ValueError as error:
            raise ModelError(f"{self.path}: {layer}: {error}") from error


def _operands(weights: QuantizedWeights, layer: str) -> Operands:
    return to_operands(weights.quantized(layer))
