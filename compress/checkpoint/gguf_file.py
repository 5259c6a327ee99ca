"""GGUF, version 3: one file of metadata and tensors, as llama.cpp reads it.

    magic "GGUF" | version, uint32 | tensors, uint64 | entries, uint64 | entries | tensor infos | padding | tensors

An entry is a key, the type of its value, and the value; a tensor info is a name, sizes with the fastest first, ggml's
type, and where the tensor begins, counted from the first and in multiples of 32 bytes. Numbers are little-endian.

Writing streams: every size is known beforehand, so the head is written first and tensors follow one at a time. Nothing
in a file is trusted when it is read: counts and lengths are bounded by the file, and tensors must lie inside it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compress.core.ggml import TYPES, BlockType
from compress.errors import ModelError, writing

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
PLAIN = {"F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16)}
"""Types without blocks: ggml's number, and torch's type."""
OTHERS = {
    "Q8_1": (9, 32, 40), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
}  # fmt: skip
"""Types that are told and not decoded: number, weights in a block, bytes of a block."""
LAYOUTS = (
    {name: (number, 1, dtype.itemsize) for name, (number, dtype) in PLAIN.items()}
    | {name: (kind.number, kind.size, kind.bytes) for name, kind in TYPES.items()}
    | OTHERS
)
NAMES = {number: name for name, (number, _, _) in LAYOUTS.items()}
MOST_ENTRIES, MOST_DIMS = 1 << 20, 4


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file; `shape` as torch has it, the fastest size last."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """One of `LAYOUTS`."""

    @property
    def nbytes(self) -> int:
        _, size, nbytes = LAYOUTS[self.kind]
        return prod(self.shape[:-1]) * (self.shape[-1] // size) * nbytes

    @property
    def number(self) -> int:
        return LAYOUTS[self.kind][0]


def save(path: Path, metadata: Mapping[str, Any], infos: Sequence[TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Write a file, whole or not at all. `tensors`: the bytes of each info's tensor, in their order.

    A value of `metadata` is a str, bool, float, int or a list of one of these. Raises OutputError and StorageError.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(_head(metadata, infos))
                _pad(stream)
                for info, tensor in zip(infos, tensors, strict=True):
                    held = tensor.detach().cpu().contiguous().view(torch.uint8).flatten()
                    if held.numel() != info.nbytes:
                        raise ValueError(f"{info.name}: has {held.numel()} bytes, expected {info.nbytes}")
                    stream.write(held.numpy().data)
                    _pad(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % ALIGNMENT))


def _head(metadata: Mapping[str, Any], infos: Sequence[TensorInfo]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    for key, value in metadata.items():
        kind = _kind(value)
        parts += [_string(key), struct.pack("<I", kind), _value(value, kind)]
    offset = 0
    for info in infos:
        sizes = info.shape[::-1]
        parts += [_string(info.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", info.number, offset))
        offset += info.nbytes + -info.nbytes % ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    held = text.encode()
    return struct.pack("<Q", len(held)) + held


def _kind(value: Any) -> int:
    if isinstance(value, list):
        return ARRAY
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, str):
        return STRING
    return FLOAT32 if isinstance(value, float) else INT32 if value < 0 else UINT32


def _value(value: Any, kind: int) -> bytes:
    if kind == ARRAY:
        inner = _kind(value[0]) if value else STRING
        inner = INT32 if inner == UINT32 else inner
        return struct.pack("<IQ", inner, len(value)) + b"".join(_value(each, inner) for each in value)
    return _string(value) if kind == STRING else struct.pack(NUMBERS[kind], value)


# ---- reading -------------------------------------------------------------------------------------------------


class GGUFFile:
    """A file that lies on disk: `metadata`, `infos` by name, and `read`, one tensor's bytes at a time.

    Raises ModelError where it is no whole GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        try:
            with path.open("rb") as stream:
                self._read_head(stream, path.stat().st_size)
        except (struct.error, UnicodeDecodeError, OSError, MemoryError, OverflowError, KeyError) as error:
            raise ModelError(f"{path}: is no whole GGUF file: {error}") from error

    def _read_head(self, stream: BinaryIO, size: int) -> None:
        magic, version, tensors, entries = stream.read(4), *self._numbers(stream, "<IQQ")
        if magic != MAGIC or version not in (2, VERSION):
            raise ModelError(f"{self.path}: begins with {magic!r}, version {version}; expected GGUF of version 2 or 3")
        if max(tensors, entries) > min(MOST_ENTRIES, size):
            raise ModelError(f"{self.path}: claims {tensors} tensors and {entries} entries, in {size} bytes")
        for _ in range(entries):
            key = self._text(stream, size)
            (kind,) = self._numbers(stream, "<I")
            self.metadata[key] = self._any(stream, kind, size)
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise ModelError(f"{self.path}: general.alignment={alignment!r} is no alignment")
        offsets = [self._read_info(stream, size) for _ in range(tensors)]
        start = stream.tell() + -stream.tell() % alignment
        for (name, offset), info in zip(offsets, self.infos.values(), strict=True):
            if start + offset + info.nbytes > size:
                raise ModelError(f"{self.path}: ends at byte {size}, inside {name}. Download it again")
            self._begin[name] = start + offset

    def _read_info(self, stream: BinaryIO, size: int) -> tuple[str, int]:
        name = self._text(stream, size)
        (dims,) = self._numbers(stream, "<I")
        if not 0 < dims <= MOST_DIMS or name in self.infos:
            raise ModelError(f"{self.path}: {name!r} has {dims} sizes, or is there twice")
        *sizes, number, offset = self._numbers(stream, f"<{dims}QIQ")
        if number not in NAMES:
            raise ModelError(f"{self.path}: {name} is of ggml's type {number}, which is not known here")
        if 0 in sizes:
            raise ModelError(f"{self.path}: {name} has sizes {sizes}, and holds nothing")
        info = TensorInfo(name, tuple(sizes[::-1]), NAMES[number])
        if sizes[0] % LAYOUTS[info.kind][1]:
            raise ModelError(f"{self.path}: {name} has rows of {sizes[0]}, no whole blocks of {info.kind}")
        self.infos[name] = info
        return name, offset

    def read(self, name: str) -> Tensor:
        """A plain tensor in its own type, or the bytes of a matrix of blocks, a row for each of its rows.

        Raises ModelError for one of `OTHERS`.
        """
        info = self.infos[name]
        if info.kind in OTHERS:
            raise ModelError(f"{self.path}: {name} is of type {info.kind}, which netsuke does not decode")
        with self.path.open("rb") as stream:
            stream.seek(self._begin[name])
            held = torch.frombuffer(bytearray(stream.read(info.nbytes)), dtype=torch.uint8)
        if info.kind in PLAIN:
            return held.view(PLAIN[info.kind][1]).view(info.shape)
        return held.view(prod(info.shape[:-1]), -1)

    def block_type(self, name: str) -> BlockType | None:
        return TYPES.get(self.infos[name].kind)

    def _numbers(self, stream: BinaryIO, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, stream.read(struct.calcsize(layout)))

    def _text(self, stream: BinaryIO, size: int) -> str:
        (length,) = self._numbers(stream, "<Q")
        if length > size:
            raise ModelError(f"{self.path}: claims a text of {length} bytes, in a file of {size}")
        return stream.read(length).decode("utf-8", errors="replace")

    def _any(self, stream: BinaryIO, kind: int, size: int) -> Any:
        if kind == STRING:
            return self._text(stream, size)
        if kind != ARRAY:
            return self._numbers(stream, NUMBERS[kind])[0]
        inner, length = self._numbers(stream, "<IQ")
        if length > size or inner == ARRAY:
            raise ModelError(f"{self.path}: claims a list of {length} values of type {inner}, in {size} bytes")
        return [self._any(stream, inner, size) for _ in range(length)]
