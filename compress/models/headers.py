"""What a model folder holds, read from `config.json` and the safetensors headers alone.

A safetensors file is eight bytes of header length, a JSON header, then the tensors' bytes. Reading only the
headers answers names, types, shapes and sizes of a 70-billion-parameter model in milliseconds, and without torch.
Format: https://github.com/huggingface/safetensors (README, "Format").

Nothing in a header is trusted: sizes are bounded, offsets must agree with shapes and with the file, and an index
may name files inside its own folder only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.models.anatomy import Anatomy

BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Of an element, by type, in the order in which `safetensors` lays out tensors."""
MAX_HEADER = 100_000_000
"""The largest header the reference implementation accepts, in bytes."""
SAMPLE = 1 << 16
"""Bytes read from the beginning and the end of each weight file for its fingerprint."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a folder: what it is, and which bytes of which file hold it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Folder:
    """A model folder as its headers describe it."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorHeader]
    files: tuple[Path, ...]
    truncated: tuple[str, ...] = ()
    """For each file shorter than its header says: a sentence."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: header.shape for name, header in self.tensors.items()}

    @property
    def bytes(self) -> int:
        """Bytes of the weight files as their headers describe them."""
        data = sum(header.nbytes for header in self.tensors.values())
        return data + sum(_header_length(file) + 8 for file in self.files)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    return BYTES[dtype] * math.prod(shape)


def read_folder(path: Path) -> Folder:
    """Read config and headers of a model folder; weights stay on disk.

    Raises ModelError where the folder, its config, an index or a header is missing or inconsistent.
    """
    if not path.is_dir():
        what = "is a file" if path.is_file() else "no such model folder"
        raise ModelError(f"{path}: {what}. Give a folder with config.json and *.safetensors")
    config = read_json(path / "config.json")
    files = _weight_files(path)
    tensors: dict[str, TensorHeader] = {}
    truncated = []
    for file in files:
        headers, length = _read_header(file)
        size = file.stat().st_size
        if size < length:
            truncated.append(f"{file}: is cut off, {size:,} of {length:,} bytes. Download it again")
        tensors |= headers
    return Folder(path, config, tensors, files, tuple(truncated))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError naming the file and the position of a mistake."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: not found. A model folder has config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def context_length(config: Mapping[str, Any]) -> int:
    """The longest sequence the model was made for; 2048 where its config does not say."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        if isinstance(config.get(key), int):
            return config[key]
    return 2048


def fingerprint(folder: Folder) -> bytes:
    """What tells a model from others: its config, and names, sizes and both ends of its weight files."""
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for file in folder.files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{size}".encode() + stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read())
    return digest.digest()


def file_bytes(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """Size in bytes of the safetensors file that `safetensors` writes for these tensors: name → (dtype, shape).

    The writer puts types in the order of `BYTES` and names in theirs, writes compact JSON and pads it to 8 bytes.
    `metadata`: what else the header says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    rank = {dtype: index for index, dtype in enumerate(BYTES)}
    for name in sorted(entries, key=lambda name: (rank[entries[name][0]], name)):
        dtype, shape = entries[name]
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index}: names {name!r}, which lies outside the folder")
            if not (path / name).is_file():
                raise ModelError(f"{index}: names {name!r}, which is not in the folder. Download it")
        return tuple(path / name for name in names)
    single = path / "model.safetensors"
    if single.is_file():
        return (single,)
    files = tuple(sorted(path.glob("*.safetensors")))
    if len(files) == 1:
        return files
    if files:
        raise ModelError(f"{path}: has {len(files)} weight files and no model.safetensors.index.json")
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if pickles:
        raise ModelError(
            f"{path}: holds {pickles[0]}, a pickle, which can run code when it is read. "
            "Convert it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
        )
    raise ModelError(f"{path}: holds no *.safetensors")


def _header_length(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def _read_header(file: Path) -> tuple[dict[str, TensorHeader], int]:
    """The tensors of one file and the length the file must have."""
    length = _header_length(file)
    size = file.stat().st_size
    if length > min(MAX_HEADER, size - 8):
        raise ModelError(f"{file}: is no whole safetensors file: header of {length:,} bytes, file of {size:,}")
    with file.open("rb") as stream:
        stream.seek(8)
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{file}: its safetensors header is damaged: {error}") from None
    return tensors, max((header.begin + header.nbytes for header in tensors.values()), default=8 + length)


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int) -> TensorHeader:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in BYTES:
        raise ModelError(f"{file}: {name} has type {dtype!r}; known are {' '.join(BYTES)}")
    if begin < 0 or any(size < 0 for size in shape) or end - begin != tensor_bytes(dtype, shape):
        raise ModelError(f"{file}: {name} has shape {list(shape)} of {dtype} but bytes {begin}…{end}")
    return TensorHeader(name, dtype, shape, file, start + begin)


def canonical(tensors: Mapping[str, TensorHeader], anatomy: Anatomy) -> dict[str, TensorHeader]:
    """Module path of each parameter → its header, whose `name` is what the file calls it.

    Some checkpoints were saved from the bare decoder and lack its prefix (`h.0…` for `transformer.h.0…`), some
    families store a module under another name, and some carry buffers that a module computes by itself; those
    are dropped.
    """
    root, _, rest = anatomy.blocks.partition(".")
    bare = not any(name.startswith(f"{root}.") for name in tensors)
    bare = bare and any(name.startswith(f"{rest}.") for name in tensors)
    paths = {}
    for name, header in tensors.items():
        if _computed(name, header.shape):
            continue
        for stored, module in anatomy.renamed.items():
            name = f".{name}".replace(f".{stored}.", f".{module}.")[1:]
        paths[f"{root}.{name}" if bare and not name.startswith("lm_head.") else name] = header
    return paths


def _computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer that the module computes by itself: rotary frequencies, causal masks, positions."""
    mask = name.endswith(".attn.bias") and len(shape) == 4
    return mask or name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", "embeddings.position_ids"))
