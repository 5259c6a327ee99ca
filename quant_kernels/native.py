"""What torch has no fast enough operator for on a CPU, in C: int4 weights with one token, and with many.

With one token the weight should take no longer than to be read: codes become bfloat16 numbers by a mask, which costs
half of what torch spends on them, so that they keep up with the memory.

Torch's integer product unpacks the weight anew for every few tokens; unpacking it once, with torch's own operations,
passes over it eight times, which takes as long as the product with 512 tokens. `cpu.c` does it in one pass, and where
the processor has a matrix unit (AMX) also multiplies: the unit works on one part of the weight while the next one is
unpacked, so that hardly more time goes by than for a weight in bfloat16.

It is compiled for this very processor when it is first needed, in a fifth of a second, and forgotten with the process.
Where there is no C compiler, or no AVX512, `loops()` is None, and torch does it all.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
COMPILERS = ("gcc", "cc")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
BLOCK_ROWS = 64
"""Of the layout that `cpu.c` reads, torch's for AVX512."""


@dataclass(frozen=True)
class Loops:
    """The compiled functions. Tensors are contiguous; packed: uint8 [rows, columns / 2], grid: bfloat16 [groups, rows,
    2], scales and zeros, with a power of two of columns to a group, as torch's own operator has them."""

    library: ctypes.CDLL
    dots: bool
    """Whether `dot` can be called: with AVX512-BF16."""
    matrix_unit: bool
    """Whether `multiply` can: with AMX, if the system lets us."""

    def dot(self, x: Tensor, packed: Tensor, grid: Tensor, y: Tensor) -> None:
        """Fills y, bfloat16 [1, rows], with x · weightᵀ; x: bfloat16 [1, columns]. Rows are whole blocks."""
        columns, rows = x.shape[1], y.shape[1]
        sizes = columns, columns // len(grid), rows
        self.library.dot_int4(*_pointers(x, packed, grid, y), *sizes, torch.get_num_threads())

    def unpack(self, packed: Tensor, grid: Tensor, out: Tensor) -> None:
        """Fills `out`, bfloat16 [columns, rows]. Rows are whole blocks."""
        columns, rows = out.shape
        group = columns // len(grid)
        self.library.unpack_int4(*_pointers(packed, grid, out), columns, group, rows, torch.get_num_threads())

    def multiply(self, x: Tensor, packed: Tensor, grid: Tensor, y: Tensor) -> None:
        """Fills the whole blocks of y, bfloat16 [tokens, rows], with x · weightᵀ; x: bfloat16 [tokens, columns]."""
        (tokens, columns), rows = x.shape, y.shape[1]
        sizes = tokens, columns, columns // len(grid), rows
        self.library.linear_int4(*_pointers(x, packed, grid, y), *sizes, torch.get_num_threads())


@cache
def loops() -> Loops | None:
    """The loops, or None where nothing compiles them."""
    compiler = next(filter(None, map(which, COMPILERS)), None)
    if compiler is None or sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.so"
        try:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(file)], check=True, capture_output=True)
            library = ctypes.CDLL(str(file))
        except (OSError, subprocess.CalledProcessError):
            return None
    for name, tensors, sizes in (("unpack_int4", 3, 3), ("dot_int4", 4, 3), ("linear_int4", 4, 4)):
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * sizes + [ctypes.c_int]
            function.restype = None
    matrix_unit = hasattr(library, "linear_int4") and bool(library.has_matrix_unit())
    return Loops(library, hasattr(library, "dot_int4"), matrix_unit)


def has_dots() -> bool:
    """Whether `Loops.dot` can be called here."""
    found = loops()
    return found is not None and found.dots


def has_matrix_unit() -> bool:
    """Whether `Loops.multiply` can be called here."""
    found = loops()
    return found is not None and found.matrix_unit


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
