"""OpenVINO checkpoints: a quantized decoder as an intermediate representation, its codes as they are.

OpenVINO reads our ONNX graph, and a MatMulNBits becomes a constant of 2, 4 or 8 bits, less its zero points, times its
scales, and a product. That is written, with the cache inside the model as OpenVINO's own pipelines have it: keys and
values are variables, and `beam_idx` [batch] says which sequence of the call before each of this one goes on from.

The CPU plugin rounds inputs to 8 bits unless it is told `DYNAMIC_QUANTIZATION_GROUP_SIZE: 0`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import onnx_model
from compress.checkpoint.onnx_blocks import BITS, Operands, from_operands
from compress.checkpoint.onnx_file import GRAPH
from compress.checkpoint.weights import QuantizedWeights
from compress.core.qtensor import QuantizedTensor
from compress.errors import ModelError, RequestError, RunError

MODEL = "openvino_model.xml"
KINDS = {f"u{bits}": bits for bits in BITS}
"""OpenVINO's types of codes."""


def openvino_package() -> ModuleType:
    """The package `openvino`. Raises RequestError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise RequestError(f"OpenVINO needs its package ({error}): pip install 'netsuke[openvino]'") from error
    return openvino


def export(weights: QuantizedWeights, folder: Path) -> None:
    """Write a model in which `onnx_model` sees no problems. Raises VerificationError unless it reads back as it was."""
    openvino = openvino_package()
    with TemporaryDirectory(dir=folder) as scratch:
        onnx_model.export(weights, Path(scratch))
        try:
            model = openvino.Core().read_model(Path(scratch) / GRAPH)  # convert_model would widen weights beforehand
            openvino.save_model(_with_cache_inside(model), folder / MODEL, compress_to_fp16=False)
        except RuntimeError as error:
            version, reason = openvino.get_version().partition("-")[0], _last_line(error)
            raise RunError(f"{folder / MODEL}: OpenVINO {version} cannot write it, 2026.4 can: {reason}") from error
        del model  # which maps the files that go now
    written = IRFile(folder)
    for layer in weights.schemes:
        onnx_model.check_same(layer, weights.quantized(layer), written.quantized(layer), written.path)


def load(folder: Path) -> dict[str, QuantizedTensor]:
    """Every quantized layer of such a folder. Raises ModelError where it is damaged."""
    file = IRFile(folder)
    return {layer: file.quantized(layer) for layer in file.layers}


def _with_cache_inside(model: Any) -> Any:
    """The model with a variable in the place of each input `past_key_values.…` and its output `present.…`."""
    from openvino import Model, Type, opset13

    given = [each for each in model.get_parameters() if not each.get_friendly_name().startswith("past_key_values")]
    beams = opset13.parameter([-1], Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    first = opset13.constant(0)
    batch = opset13.gather(opset13.shape_of(given[0]), opset13.constant([0]), first)
    sinks = []
    for past in model.get_parameters():
        name, shape = past.get_friendly_name(), past.get_partial_shape()
        if not name.startswith("past_key_values"):
            continue
        sizes = opset13.constant([shape[1].get_length(), 0, shape[3].get_length()])
        empty = opset13.broadcast(opset13.constant(0.0, Type.f32), opset13.concat([batch, sizes], 0))
        state = opset13.read_value(empty, name, past.get_element_type(), shape)
        chosen = opset13.gather(state, beams, first)
        for reader in past.output(0).get_target_inputs():
            reader.replace_source_output(chosen.output(0))
        result = model.output(name.replace("past_key_values", "present")).get_node()
        sinks.append(opset13.assign(result.input_value(0).get_node(), name))
    return Model([model.output("logits").get_node()], sinks, [*given, beams], "decoder")


# ---- reading -------------------------------------------------------------------------------------------------


class IRFile:
    """A model that lies on disk, whose quantized layers are read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODEL
        with self._reading():
            self._model = openvino_package().Core().read_model(self.path)
        self._nodes = {node.get_friendly_name(): node for node in self._model.get_ops()}

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".codes") for name in self._nodes if name.endswith(".codes")]

    def quantized(self, layer: str) -> QuantizedTensor:
        """One layer's codes, scales and zero points."""
        codes, scales = self._node(f"{layer}.codes"), self._node(f"{layer}.scales")
        zeros = self._nodes.get(f"{layer}.zero_points")
        product = self._nodes.get(f"{layer}.product") or self._node(layer)
        with self._reading(layer):
            rows, blocks, block = codes.shape
            held = Operands(
                columns=product.input(1).get_partial_shape()[1].get_length(),
                bits=KINDS.get(codes.get_element_type().get_type_name(), 0),
                block=block,
                codes=_held(codes).view(rows, blocks, -1),
                scales=_held(scales).view(rows, -1),
                zero_points=None if zeros is None else _held(zeros).view(rows, -1),
            )
            return from_operands(held)

    def _node(self, name: str) -> Any:
        if name not in self._nodes:
            raise ModelError(f"{self.path}: {name} is missing")
        return self._nodes[name]

    @contextmanager
    def _reading(self, layer: str = "") -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.path}: {layer or 'cannot be read'}: {_last_line(error)}") from error


def _held(constant: Any) -> Tensor:
    """The bytes of codes as they lie there, or numbers of another type."""
    return torch.from_numpy(constant.data.copy())


def _last_line(error: Exception) -> str:
    """What is the matter; OpenVINO says first where in its own source it was seen."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
