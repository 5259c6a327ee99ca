"""Activations of the calibration windows, kept in a file.

One array of shape [windows, length, width], appended batch by batch and read back batch by batch. The operating
system's page cache makes it quick where memory allows, the more so where a file that is there is written again; the
process itself never holds more than one batch. The file that a finished block leaves behind is the exact input of the
next one, which is what makes every block a resume point.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError, writing


class Activations:
    """A file of hidden states [windows, length, width] of one dtype."""

    def __init__(self, path: Path, length: int, width: int, dtype: torch.dtype, windows: int = 0) -> None:
        self.path = path
        self.length = length
        self.width = width
        self.dtype = dtype
        self.windows = windows
        self._window_bytes = length * width * dtype.itemsize

    def append(self, batch: Float[Tensor, "batch length width"]) -> None:
        if batch.shape[1:] != (self.length, self.width):
            raise NumericalError(f"{self.path.name}: got activations of shape {list(batch.shape)}")
        rows = batch.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with writing(self.path), self.path.open("r+b" if self.path.exists() else "wb") as stream:
            stream.seek(self.windows * self._window_bytes)
            stream.write(rows.data)
        self.windows += batch.shape[0]

    def read(self, start: int, stop: int) -> Float[Tensor, "batch length width"]:
        """Windows `start` to `stop`, mapped and not copied: good until the file is written again."""
        stop = min(stop, self.windows)
        size = (stop - start) * self._window_bytes
        try:
            mapped = np.memmap(self.path, np.uint8, mode="c", offset=start * self._window_bytes, shape=(size,))
        except ValueError as error:
            raise NumericalError(
                f"{self.path}: holds fewer than {stop} windows; the run's scratch files were changed"
            ) from error
        return torch.from_numpy(mapped).view(self.dtype).view(-1, self.length, self.width)

    def sync(self) -> None:
        """Make sure the file survives a power cut before anything refers to it."""
        with writing(self.path), self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def moved(self, path: Path) -> Activations:
        """The same under another name, out of the way of what will be written to this one."""
        with writing(path):
            self.path.replace(path)
        return Activations(path, self.length, self.width, self.dtype, self.windows)

    def rewind(self) -> None:
        """Begin again; what is there will be overwritten."""
        self.windows = 0
