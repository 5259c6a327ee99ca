"""ONNX files: what is written is read back, and damaged or hostile ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.onnx_file import DATA, GRAPH, PAGE, GraphWriter, ONNXFile
from compress.errors import ModelError, RequestError

onnx = pytest.importorskip("onnx", reason="needs the package onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A graph that adds two weights to its input."""
    with GraphWriter(tmp_path) as graph:
        given = graph.input("given", torch.float32, ["batch", 3])
        graph.output("result", torch.float32, ["batch", 3])
        half = graph.node("Cast", graph.weight("half", torch.ones(3, dtype=torch.bfloat16)), to=1)
        first = graph.node("Add", given, half)
        graph.node("Add", first, graph.weight("whole", torch.arange(3.0)), name="result")
    return tmp_path


def test_what_is_written_is_read_back(folder: Path) -> None:
    file = ONNXFile(folder)
    assert torch.equal(file.read("half"), torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(file.read("whole"), torch.arange(3.0))
    assert [node.operator for node in file.nodes] == ["Cast", "Add", "Add"]


def test_it_is_onnx_to_the_checker_and_computes(folder: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    session = runtime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"given": torch.ones(2, 3).numpy()})
    assert result.tolist() == [[2.0, 3.0, 4.0]] * 2


def test_weights_begin_at_pages_and_a_weight_is_there_once(tmp_path: Path) -> None:
    with GraphWriter(tmp_path) as graph:
        for value in (1.0, 2.0, 1.0):
            graph.weight(f"w{value}", torch.full((5,), value))
    assert (tmp_path / DATA).stat().st_size == PAGE + 20
    assert [tensor.begin for tensor in ONNXFile(tmp_path).tensors.values()] == [0, PAGE]


def test_a_graph_that_fails_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    def interrupted() -> None:
        with GraphWriter(tmp_path) as graph:
            graph.weight("w", torch.ones(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / GRAPH).exists()


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    """The graph with its weights' entries changed."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model.graph)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def entry(key: str, value: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        (found,) = (each for each in graph.initializer[0].external_data if each.key == key)
        found.value = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("location", "../secret"), "lies in '../secret', which is no file beside the graph"),
        (entry("location", "/etc/passwd"), "which is no file beside the graph"),
        (entry("location", "..\\secret"), "which is no file beside the graph"),
        (entry("location", "."), "which is no file beside the graph"),
        (entry("location", ""), "which is no file beside the graph"),
        (entry("location", "absent"), "which is no file beside the graph"),
        (entry("offset", "-4096"), "and half 6 from -4096 on"),
        (entry("offset", "1e3"), "and half 6 from 1e3 on"),
        (entry("offset", "9" * 30), "and half 6 from 9999"),
        (entry("length", "7"), "half has 7 bytes, 6 are expected"),
        (
            lambda graph: graph.initializer[0].dims.__setitem__(0, 1 << 62),
            "has 6 bytes, 9223372036854775808 are expected",
        ),
        (lambda graph: graph.initializer[0].dims.__setitem__(0, -3), r"half is \[-3\] of ONNX's type 16"),
        (lambda graph: setattr(graph.initializer[0], "data_type", 8), "of ONNX's type 8"),
        (lambda graph: setattr(graph.initializer[0], "name", "whole"), "holds whole twice"),
    ],
)
def test_a_weight_that_is_not_where_the_graph_says_is_refused(
    change: Callable[[Any], None], message: str, folder: Path
) -> None:
    (folder.parent / "secret").write_bytes(bytes(6))
    rewritten(folder, change)
    with pytest.raises(ModelError, match=message):
        ONNXFile(folder)


def test_a_file_that_ends_early_is_refused(folder: Path) -> None:
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1])
    with pytest.raises(ModelError, match="and whole 12 from 4096 on"):
        ONNXFile(folder)


@pytest.mark.parametrize("held", [b"\xff" * 64, b"\x0a\xff"])
def test_what_is_no_protobuf_is_refused(held: bytes, folder: Path) -> None:
    (folder / GRAPH).write_bytes(held)
    with pytest.raises(ModelError, match="is no whole ONNX file"):
        ONNXFile(folder)


def test_a_missing_tensor_or_one_without_its_bytes_is_named(folder: Path) -> None:
    rewritten(folder, lambda graph: graph.initializer.add(name="empty", data_type=1, dims=[4]))
    file = ONNXFile(folder)
    with pytest.raises(ModelError, match="absent is missing"):
        file.read("absent")
    with pytest.raises(ModelError, match="empty has 0 bytes, 16 are expected"):
        file.read("empty")


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        ONNXFile(tmp_path)


def test_the_missing_package_is_named(tmp_path: Path, without: Callable[[str], None]) -> None:
    without("onnx")
    with pytest.raises(RequestError, match=r"pip install 'netsuke\[onnx\]'"):
        GraphWriter(tmp_path)
