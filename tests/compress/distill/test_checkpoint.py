"""Checkpoints: which one counts, and what a training is known by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from compress.distill.checkpoint import Checkpoints, key_of
from compress.errors import OutputError


def curve(steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0, "held_out": None, "learning_rate": 0.1} for step in range(steps + 1)]


def test_the_last_whole_folder_counts_and_the_result_above_all(tmp_path: Path) -> None:
    checkpoints, accelerator = Checkpoints(tmp_path, "key"), Accelerator()
    checkpoints.prepare(accelerator)
    assert checkpoints.latest is None
    for steps in (9, 10):
        checkpoints.save(accelerator, curve(steps), {"w": torch.tensor([float(steps)])})
        assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{steps:08d}"]
    (tmp_path / "checkpoint-00000003").mkdir()  # as a process leaves it that is killed while it removes an old one
    (tmp_path / "checkpoint.tmp").mkdir()
    checkpoints.prepare(accelerator)
    found = checkpoints.latest
    assert found is not None
    assert found.name == "checkpoint-00000010"
    assert (found / "random_states_0.pkl").exists()
    assert checkpoints.read(found) == (curve(10), {"w": torch.tensor([10.0])})
    checkpoints.finish(accelerator, curve(12), {"w": torch.tensor([12.0])})
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]
    with pytest.raises(OutputError, match="holds a training of other options"):
        _ = Checkpoints(tmp_path, "another").latest


def test_other_weights_of_the_same_shapes_are_another_training(tiny: Path, wide: Path, tmp_path: Path) -> None:
    tokens = [torch.arange(6).view(2, 3)]
    keys = [
        key_of({"a": 1}, tokens, [tiny]),
        key_of({"a": 2}, tokens, [tiny]),
        key_of({"a": 1}, [tokens[0].view(3, 2)], [tiny]),
        key_of({"a": 1}, tokens, [tiny, wide]),
        key_of({"a": 1}, tokens, [same_but_one_weight(tiny, tmp_path)]),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of({"a": 1}, tokens, [tiny]) == keys[0]


def same_but_one_weight(folder: Path, to: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= name.endswith("safetensors")
        (to / name).write_bytes(content)
    return to
