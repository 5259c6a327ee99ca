"""Checkpoints of a training: everything it needs to go on exactly where it was, there as a whole or not at all.

    work/checkpoint-00000050/    what accelerate keeps: weights, optimizer, random numbers, of all processes
                                 + curve.json, the steps so far, and weights.safetensors, the best ones so far
    work/trained/                curve.json and weights.safetensors of a training that has come to its end

A folder is written beside its place, forced to the disk and then renamed; what it replaces is removed after that. A
process may be killed at any moment: the last folder that has its final name is whole. Where a training is, and which
weights are its best, follows from the curve.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import OutputError, writing
from compress.models.headers import fingerprint, read_folder

Curve = list[dict[str, Any]]
"""For each step, its number, `loss`, `held_out` where it was measured, and `learning_rate`; first what was before."""


def key_of(facts: Any, tokens: Sequence[Int[Tensor, "windows length"]], folders: Sequence[Path]) -> str:
    """What a training is known by: its options, its windows, and the models in these folders."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for windows in tokens:
        digest.update(f"{list(windows.shape)}".encode() + windows.cpu().numpy().tobytes())
    for path in folders:
        digest.update(fingerprint(read_folder(path)))
    return digest.hexdigest()


class Checkpoints:
    """Those of one training in one folder."""

    def __init__(self, work: Path, key: str) -> None:
        self.work = work
        self.key = key

    @property
    def latest(self) -> Path | None:
        """The folder to go on from: the result if there is one. Raises OutputError where it is of another training."""
        folders = [*sorted(self.work.glob("checkpoint-*")), *self.work.glob("trained")]
        if not folders:
            return None
        if json.loads((folders[-1] / "curve.json").read_text())["key"] != self.key:
            raise OutputError(
                f"{self.work}: holds a training of other options, windows or models, or by another number of "
                "processes. Repeat the original one, or remove the folder"
            )
        return folders[-1]

    def read(self, folder: Path) -> tuple[Curve, dict[str, Tensor]]:
        return json.loads((folder / "curve.json").read_text())["curve"], load_file(folder / "weights.safetensors")

    def prepare(self, accelerator: Any) -> None:
        """Make the folder, and clear away what a killed process was about to write. All processes call it."""
        if accelerator.is_main_process:
            with writing(self.work):
                self.work.mkdir(parents=True, exist_ok=True)
                for left in (self.work / "checkpoint.tmp", self.work / "trained.tmp"):
                    if left.exists():
                        shutil.rmtree(left)
        accelerator.wait_for_everyone()

    def save(self, accelerator: Any, curve: Curve, best: dict[str, Tensor]) -> None:
        """All that is needed to go on. All processes call it; the main one gives curve and weights."""
        temporary = self.work / "checkpoint.tmp"
        with writing(temporary):
            accelerator.save_state(str(temporary), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._publish(temporary, f"checkpoint-{len(curve) - 1:08d}", curve, best)
        accelerator.wait_for_everyone()

    def finish(self, accelerator: Any, curve: Curve, state: dict[str, Tensor]) -> None:
        """The result. All processes call it; the main one gives curve and weights."""
        if accelerator.is_main_process:
            temporary = self.work / "trained.tmp"
            temporary.mkdir()
            self._publish(temporary, "trained", curve, state)
        accelerator.wait_for_everyone()

    def _publish(self, temporary: Path, name: str, curve: Curve, weights: dict[str, Tensor]) -> None:
        with writing(temporary):
            save_file(weights, temporary / "weights.safetensors")
            (temporary / "curve.json").write_text(json.dumps({"key": self.key, "curve": curve}))
            for path in (*temporary.rglob("*"), temporary):
                _force(path)
            replaced = list(self.work.glob("checkpoint-*"))
            os.rename(temporary, self.work / name)
            _force(self.work)
            for folder in replaced:
                shutil.rmtree(folder)


def _force(path: Path) -> None:
    """Make sure that a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
