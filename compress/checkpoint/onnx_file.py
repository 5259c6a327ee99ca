"""An ONNX model on disk: `model.onnx`, a graph in a protobuf, and `model.onnx.data`, the bytes of its weights.

Writing streams: a weight is on disk as soon as it is given, and the graph, which says where each one lies, is written
last. Weights begin at multiples of a page, so that a runtime can map them. Nothing is trusted when a file is read:
weights must lie in a file beside the graph, inside it, and have the bytes that their sizes ask for.

Format: https://github.com/onnx/onnx/blob/main/docs/IR.md and ExternalData.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError, RequestError, writing

GRAPH, DATA = "model.onnx", "model.onnx.data"
TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.bfloat16: 16,
}  # fmt: skip
"""torch's types → ONNX's numbers of them."""
DOMAINS = {"": 23, "com.microsoft": 1}
"""Operator sets: ONNX's own since it has attention, and onnxruntime's."""
IR_VERSION, PAGE, LARGEST_GRAPH = 11, 4096, 1 << 28


def onnx_package() -> ModuleType:
    """The package `onnx`. Raises RequestError where it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise RequestError(f"ONNX needs the package onnx ({error}): pip install 'netsuke[onnx]'") from error
    return onnx


class GraphWriter:
    """A graph under construction. Values are known by name; every verb gives the name of the one it makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._onnx = onnx_package()
        self._nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __enter__(self) -> GraphWriter:
        with writing(self.folder):
            self._data = (self.folder / DATA).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._data, writing(self.folder):
            if kind is None:
                self._finish()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[str | int]) -> str:
        """What a runtime is given; a size with a name may differ from call to call."""
        self._inputs.append(self._onnx.helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Sequence[str | int]) -> str:
        self._outputs.append(self._onnx.helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def node(
        self,
        operator: str,
        *inputs: str,
        name: str = "",
        outputs: Sequence[str] = (),
        domain: str = "",
        **settings: Any,
    ) -> str:
        """One operation; its first output, which has the name of the node unless others are given."""
        name = name or f"{operator}_{len(self._nodes)}"
        outputs = outputs or (name,)
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, outputs, name, domain=domain, **settings))
        return outputs[0]

    def constant(self, name: str, value: Tensor) -> str:
        """A few numbers, in the graph itself, where a runtime can reason about them."""
        if name not in self._tensors:
            self._tensors[name] = self._proto(name, value)
            self._tensors[name].raw_data = _bytes(value).tobytes()
        return name

    def weight(self, name: str, value: Tensor) -> str:
        """A tensor in the file beside the graph, in its own type; once, however often it is given."""
        if name in self._tensors:
            return name
        self._tensors[name] = proto = self._proto(name, value)
        proto.data_location = self._onnx.TensorProto.EXTERNAL
        with writing(self.folder / DATA):
            self._data.write(bytes(-self._data.tell() % PAGE))
            told = {"location": DATA, "offset": self._data.tell()}
            told["length"] = self._data.write(_bytes(value))
        for key, entry in told.items():
            proto.external_data.add(key=key, value=str(entry))
        return name

    def _proto(self, name: str, value: Tensor) -> Any:
        return self._onnx.TensorProto(name=name, data_type=TYPES[value.dtype], dims=value.shape)

    def _finish(self) -> None:
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, [*self._tensors.values()])
        domains = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="netsuke")
        self._data.flush()
        os.fsync(self._data.fileno())
        with (self.folder / GRAPH).open("wb") as stream:
            stream.write(model.SerializeToString())
            stream.flush()
            os.fsync(stream.fileno())


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, and where its bytes are: `held` in the graph, or from `begin` on in `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    held: bytes = b""
    file: Path | None = None
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Node:
    """One operation of a graph; `settings` are its whole numbers."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    settings: Mapping[str, int]


class ONNXFile:
    """A model that lies on disk: its `nodes`, its `tensors` by name, and `read`, one of them at a time.

    Raises ModelError where the graph is damaged or a tensor does not lie where it says.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / GRAPH
        onnx = onnx_package()
        try:
            size = self.path.stat().st_size
            if size > LARGEST_GRAPH:
                raise ModelError(f"{self.path}: has {size:,} bytes. Graphs with weights inside are not read")
            graph = onnx.load_model_from_string(self.path.read_bytes()).graph
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        except Exception as error:
            if type(error).__name__ != "DecodeError":
                raise
            raise ModelError(f"{self.path}: is no whole ONNX file: {error}") from error
        self.nodes = [
            Node(node.name, node.op_type, tuple(node.input), {each.name: each.i for each in node.attribute})
            for node in graph.node
        ]
        self.tensors: dict[str, StoredTensor] = {}
        for proto in graph.initializer:
            if proto.name in self.tensors:
                raise ModelError(f"{self.path}: holds {proto.name} twice")
            self.tensors[proto.name] = self._stored(proto)

    def read(self, name: str) -> Tensor:
        """Raises ModelError where there is no such tensor."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: {name} is missing")
        tensor = self.tensors[name]
        held = bytearray(tensor.held)
        if tensor.file is not None:
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.begin)
                held = bytearray(stream.read(tensor.nbytes))
        if len(held) != tensor.nbytes:
            raise ModelError(f"{self.path}: {name} has {len(held)} bytes, {tensor.nbytes} are expected")
        return torch.frombuffer(held, dtype=tensor.dtype).view(tensor.shape) if held else torch.empty(tensor.shape)

    def _stored(self, proto: Any) -> StoredTensor:
        kinds = {number: dtype for dtype, number in TYPES.items()}
        shape = tuple(proto.dims)
        if proto.data_type not in kinds or any(size < 0 for size in shape):
            raise ModelError(f"{self.path}: {proto.name} is {list(shape)} of ONNX's type {proto.data_type}")
        dtype = kinds[proto.data_type]
        if not proto.data_location:
            return StoredTensor(dtype, shape, held=proto.raw_data)
        told = {entry.key: entry.value for entry in proto.external_data}
        location, begin = told.get("location", ""), told.get("offset", "0")
        file = self.path.parent / location
        if Path(location).name != location or "\\" in location or not file.is_file():
            raise ModelError(f"{self.path}: {proto.name} lies in {location!r}, which is no file beside the graph")
        tensor = StoredTensor(dtype, shape, file=file, begin=int(begin) if begin.isascii() and begin.isdigit() else -1)
        length = told.get("length", str(tensor.nbytes))
        if length != str(tensor.nbytes):
            raise ModelError(f"{self.path}: {proto.name} has {length} bytes, {tensor.nbytes} are expected")
        size = file.stat().st_size
        if tensor.begin < 0 or tensor.begin + tensor.nbytes > size:
            raise ModelError(f"{file}: has {size} bytes, and {proto.name} {tensor.nbytes} from {begin} on")
        return tensor
