"""The manifest: which blocks of a run are finished, and what the run was.

It lies beside the finished shards and is replaced atomically after each block. A run may be resumed only by the very
same request: the key is a hash over the resolved recipe, the model's files and the calibration tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError, writing
from compress.models.headers import Folder, fingerprint

if TYPE_CHECKING:
    from compress.checkpoint.folder import OutputFolder


@dataclass
class Manifest:
    """What is finished; `save` after every change."""

    path: Path
    key: str
    blocks: int = 0
    """Finished blocks, whose shards are final."""
    phase: str = "blocks"
    """blocks → written (every file is there) → verified."""
    width: int = 0
    """Width of the stored activations."""
    seconds: list[float] = field(default_factory=list)
    """Per stage."""
    layers: list[list[dict[str, Any]]] = field(default_factory=list)
    """Per stage, the layer reports so far."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the report needs from an earlier part of the run."""

    def save(self) -> None:
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(content).encode())

    @classmethod
    def begin(cls, folder: OutputFolder, key: str, num_stages: int, *, resume: bool) -> Manifest:
        """Open the folder of a run: as it was left, where it is resumed, or empty. Raises OutputError."""
        path = folder.scratch / "manifest.json"
        manifest = cls.load(path, key) if resume else cls(path, key)
        folder.open(resume=resume)
        if not resume:
            manifest.seconds, manifest.layers = [0.0] * num_stages, [[] for _ in range(num_stages)]
            manifest.save()
        return manifest

    @classmethod
    def load(cls, path: Path, key: str) -> Manifest:
        """Read a manifest and check that it belongs to this request. Raises OutputError where it does not."""
        try:
            manifest = cls(path=path, **json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise OutputError(f"{path}: cannot be resumed from: {error}. Start again with --overwrite") from error
        if manifest.key != key:
            raise OutputError(
                f"{path.parent.parent}: holds a run of another recipe, model or calibration text. "
                "Repeat the original command, or start again with --overwrite"
            )
        return manifest


def run_key(recipe: str, folder: Folder, data_hash: str) -> str:
    """The identity of a run: resolved recipe, model fingerprint, hash of the calibration tokens."""
    digest = hashlib.sha256(fingerprint(folder))
    for part in (recipe, data_hash):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, whole, even after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        replace_durably(temporary, path)


def replace_durably(source: Path, target: Path) -> None:
    """Rename a synced file over another, and make sure that the renaming itself has reached the disk."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
