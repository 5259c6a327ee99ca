"""Formats that hold the whole model as a graph of operations, its quantized layers' codes among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from compress.checkpoint import onnx_model, openvino_model
from compress.checkpoint.onnx_file import onnx_package
from compress.checkpoint.weights import QuantizedWeights

GRAPHS: dict[str, Callable[[QuantizedWeights, Path], None]] = {
    "onnx": onnx_model.export,
    "onnx-a8": partial(onnx_model.export, int8_inputs=True),
    "openvino": openvino_model.export,
}
"""By the name that `netsuke convert` knows: what writes such a folder."""


def require(name: str) -> None:
    """Raises RequestError where a package is missing that such a folder is written with."""
    onnx_package()
    if name == "openvino":
        openvino_model.openvino_package()
