"""A teacher's distributions, computed once and kept in a file: its k likeliest tokens, and how likely the others are.

With a vocabulary of 128k, what a teacher says about one token takes 256 KB in bfloat16. Its 64 likeliest tokens and one
number for the rest take 386 bytes in float16, and then a student is trained without a teacher in memory, as often as
wanted. Nothing is scaled to sum to 1 (`compress.distill.losses` says what is lost). float16 suits logarithms better
than bfloat16: it has eight times as many levels between -1 and -65504, where they lie.

The file: a header of `HEADER` bytes, then one record for each window, all of one size, in the order of windows.

    header    magic [8] | number of windows, uint64 [8] | layout as JSON, filled up with blanks
    record    indices [length, k] uint16, or int32 above 65536 tokens | log-probabilities [length, k + 1], the tail last

All numbers are little-endian. A window counts once the header says so, and the header says so once the records have
reached the disk. A run that was killed while it wrote leaves bytes behind that count for nothing and are written over.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from compress.distill.losses import CHUNK_BYTES, TopK
from compress.errors import NumericalError, OutputError, writing

MAGIC = b"NETSUKE\x01"
HEADER = 4096
COUNT_AT = len(MAGIC)
LAYOUT_AT = COUNT_AT + 8

Precision = Literal["float16", "bfloat16", "float32"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def top_k(
    logits: Float[Tensor, "*tokens vocabulary"], k: int, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> TopK:
    """The k likeliest tokens of each distribution, the likeliest first, in float32; some tokens at a time.

    Raises ValueError where there are not so many, NumericalError where a logit is NaN or all are -∞.
    """
    vocabulary = logits.shape[-1]
    if not 0 < k <= vocabulary:
        raise ValueError(f"k={k} must be at least 1 and at most the vocabulary's {vocabulary}")
    flat = logits.detach().reshape(-1, vocabulary)
    indices = torch.empty(len(flat), k, dtype=torch.int64, device=flat.device)
    log_probs = torch.empty(len(flat), k + 1, dtype=torch.float32, device=flat.device)
    size = max(1, chunk_bytes // (4 * vocabulary))
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        log_p = F.log_softmax(flat[rows].float() / temperature, dim=-1)
        log_probs[rows, :k], indices[rows] = log_p.topk(k, dim=-1)
        log_probs[rows, k] = log_p.scatter_(-1, indices[rows], -torch.inf).logsumexp(dim=-1)
    log_probs.clamp_(max=0)  # the tail is a sum that rounding may leave above 1
    if log_probs.isnan().any():
        raise NumericalError(f"logits of {int(log_probs.isnan().any(dim=-1).sum())} tokens are no distribution: NaN")
    shape = logits.shape[:-1]
    return TopK(indices.view(*shape, k), log_probs.view(*shape, k + 1), temperature)


@dataclass(frozen=True)
class Layout:
    """What the header says: the shape of a record, and what the numbers are of."""

    key: str
    """Of the teacher and the tokens, whatever they are told apart by."""
    vocabulary: int
    length: int
    """Tokens per window."""
    k: int
    temperature: float = 1.0
    precision: Precision = "float16"

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.vocabulary:
            raise ValueError(f"k={self.k} must be at least 1 and at most the vocabulary's {self.vocabulary}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(DTYPES)}")

    @property
    def record(self) -> np.dtype:
        index = "<u2" if self.vocabulary <= 1 << 16 else "<i4"
        bits = f"<u{DTYPES[self.precision].itemsize}"
        return np.dtype([("indices", index, (self.length, self.k)), ("log_probs", bits, (self.length, self.k + 1))])


class TeacherCache:
    """A file of `TopK` for windows of tokens, appended window by window and read by their numbers.

    Opening begins a new file, or goes on with one of this very layout after the last window that was written whole;
    raises OutputError where the file is another, or shorter than its header says.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.windows = 0
        self._record = layout.record
        if path.exists():
            self.windows = _stored_windows(path, layout)
        else:
            _begin(path, layout)

    def append(self, top: TopK) -> None:
        """Add windows [windows, length, …]; when it returns they are on the disk.

        Raises ValueError where they are not of this layout, NumericalError where they are no log-probabilities.
        """
        layout, shape = self.layout, top.indices.shape
        if shape[1:] != (layout.length, layout.k) or top.log_probs.shape != (*shape[:2], layout.k + 1):
            raise ValueError(f"{self.path}: top-k {list(shape)} is not of windows [{layout.length}, {layout.k}]")
        if top.temperature != layout.temperature:
            raise ValueError(f"{self.path}: is of temperature {layout.temperature:g}, not {top.temperature:g}")
        if not (top.log_probs <= 0).all() or not ((top.indices >= 0) & (top.indices < layout.vocabulary)).all():
            raise NumericalError(f"{self.path}: log-probabilities above 0 or NaN, or tokens beyond {layout.vocabulary}")
        records = np.empty(shape[0], self._record)
        records["indices"] = top.indices.cpu().numpy()
        log_probs = top.log_probs.detach().to("cpu", DTYPES[layout.precision]).contiguous()
        bits = self._record["log_probs"].base
        records["log_probs"] = log_probs.view(torch.uint8).numpy().view(bits)
        with writing(self.path), self.path.open("r+b") as stream:
            stream.seek(HEADER + self.windows * self._record.itemsize)
            stream.write(records.view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(COUNT_AT)
            stream.write((self.windows + shape[0]).to_bytes(8, "little"))
        self.windows += shape[0]

    def read(self, start: int, stop: int) -> TopK:
        """Windows `start` to `stop`, in memory: indices in int64, log-probabilities in float32.

        Raises ValueError where there are not so many yet, NumericalError where the file has become shorter.
        """
        if not 0 <= start <= stop <= self.windows:
            raise ValueError(f"{self.path}: holds {self.windows} windows, not {start} to {stop}")
        records = np.empty(stop - start, self._record)
        with self.path.open("rb") as stream:
            stream.seek(HEADER + start * self._record.itemsize)
            if stream.readinto(records.view(np.uint8).data) != records.nbytes:
                raise NumericalError(f"{self.path}: holds fewer than {stop} windows; the file was changed")
        indices = torch.from_numpy(records["indices"].astype(np.int64))
        bits = torch.from_numpy(np.ascontiguousarray(records["log_probs"]).view(np.uint8))
        return TopK(indices, bits.view(DTYPES[self.layout.precision]).float(), self.layout.temperature)


def _begin(path: Path, layout: Layout) -> None:
    """A file without windows, there as a whole or not at all."""
    description = json.dumps(asdict(layout)).encode()
    if len(description) > HEADER - LAYOUT_AT:
        raise ValueError(f"key={layout.key[:40]!r}… is too long; use a hash")
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        with temporary.open("wb") as stream:
            stream.write(MAGIC + bytes(8) + description.ljust(HEADER - LAYOUT_AT))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)


def _stored_windows(path: Path, layout: Layout) -> int:
    """How many windows count. Raises OutputError where the file is another or is not whole."""
    with path.open("rb") as stream:
        header = stream.read(HEADER)
    try:
        stored = json.loads(header[LAYOUT_AT:]) if header.startswith(MAGIC) and len(header) == HEADER else None
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise OutputError(f"{path}: is no cache of a teacher; move it away")
    wanted = asdict(layout)
    if stored != wanted:
        others = [f"{name} {stored.get(name)} ≠ {value}" for name, value in wanted.items() if stored.get(name) != value]
        raise OutputError(f"{path}: holds another teacher, other tokens or another layout: {', '.join(others)}")
    windows = int.from_bytes(header[COUNT_AT:LAYOUT_AT], "little")
    needed = HEADER + windows * layout.record.itemsize
    if path.stat().st_size < needed:
        raise OutputError(
            f"{path}: has {path.stat().st_size} bytes and needs {needed} for {windows} windows; delete it"
        )
    return windows
