"""The one loop that torch has no fast operator for, in C: int4 weights to bfloat16, for products with many tokens.

Torch's own operations pass over the weight eight times, which takes as long as the product with 512 tokens; `unpack.c`
passes over it once, in a tenth of that. It is compiled for this very processor when it is first needed, in a fifth of a
second, and forgotten with the process. Where there is no C compiler, `unpacker()` is None and torch does it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("unpack.c")
COMPILERS = ("cc", "gcc", "clang")
BLOCK_ROWS = 64
"""Of the layout that `unpack.c` reads, torch's for AVX512."""

Unpacker = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(packed uint8 [rows, columns / 2], scale, zero float32 [groups, rows], out bfloat16 [columns, rows]): fills `out`."""


@cache
def unpacker() -> Unpacker | None:
    """The compiled loop, or None where nothing compiles it. It takes whole blocks of 64 rows, all contiguous."""
    compiler = next(filter(None, map(which, COMPILERS)), None)
    if compiler is None or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "unpack.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).unpack_int4
        except (OSError, subprocess.CalledProcessError):
            return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5
    function.restype = None

    def unpack(packed: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
        columns, rows = out.shape
        blocks = rows // BLOCK_ROWS
        threads = min(torch.get_num_threads(), blocks)
        pointers = [each.data_ptr() for each in (packed, scale, zero, out)]

        def part(index: int) -> None:
            first, last = (blocks * each // threads for each in (index, index + 1))
            function(*pointers, first, last, columns, columns // len(scale), rows)

        if threads == 1:
            part(0)
        else:
            list(_pool(threads).map(part, range(threads)))

    return unpack


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run beside each other: a call into C holds no lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="unpack")
