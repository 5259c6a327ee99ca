"""Measurements that outlive the process which made them: a file of lines, one appended as each is made.

A line is a checksum, then a key and a value as JSON. What a crash cut off, or a disk lost, does not match its checksum
and counts as never measured. A line is appended by one write, so that several processes may share a file; the worst
that they do to each other is to measure the same thing twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Journal:
    """Values by key, those of earlier processes among them. Without a file it forgets.

    The folder of the file must exist.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.asked = self.found = 0
        """How often a value was wanted, and how often it was there."""
        lines = path.read_bytes().split(b"\n") if path is not None and path.exists() else []
        self._values: dict[str, Any] = dict(entry for line in lines if (entry := _read(line)) is not None)

    def get(self, key: str) -> Any:
        """None where nothing is known."""
        value = self._values.get(key)
        self.asked += 1
        self.found += value is not None
        return value

    def put(self, key: str, value: Any) -> None:
        """Keep a value that JSON can hold, but None."""
        if self.path is None:
            return
        self._values[key] = value
        content = json.dumps([key, value]).encode()
        with self.path.open("ab", buffering=0) as file:
            file.write(b"\n" + _checksum(content) + content)  # a line cut off before it stays alone on its line

    def fill(self, keys: Sequence[str], measure: Callable[[list[int]], Iterable[Any]]) -> list[Any]:
        """The values of keys; those of unknown places are what `measure` gives, in order, and kept as they come."""
        values = [self.get(key) for key in keys]
        unknown = [place for place, value in enumerate(values) if value is None]
        for place, value in zip(unknown, measure(unknown) if unknown else (), strict=True):
            values[place] = value
            self.put(keys[place], value)
        return values


def digest(*parts: bytes | str) -> str:
    """A key for something long."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors as JSON holds them, bit for bit."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), [*tensor.shape], base64.b64encode(_bytes(tensor)).decode()]
        for name, tensor in tensors.items()
    }


def unpacked(held: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(content)), dtype=getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, content) in held.items()
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:32].encode() + b" "


def _read(line: bytes) -> tuple[str, Any] | None:
    checksum, _, content = line.partition(b" ")
    if not content or _checksum(content) != checksum + b" ":
        return None
    key, value = json.loads(content)
    return key, value
