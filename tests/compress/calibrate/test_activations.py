from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.calibrate.activations import Activations
from compress.errors import NumericalError, StorageError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_appended_in_batches_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(7, 5, 3).to(dtype)
    file = Activations(tmp_path / "a", 5, 3, dtype)
    file.append(states[:4])
    file.append(states[4:])
    assert torch.equal(file.read(2, 6), states[2:6])
    assert torch.equal(file.read(6, 99), states[6:])


def test_a_new_run_overwrites_an_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"left over")
    file = Activations(tmp_path / "a", 2, 2, torch.float32)
    file.append(torch.ones(1, 2, 2))
    assert torch.equal(file.read(0, 1), torch.ones(1, 2, 2))


def test_a_shortened_file_is_noticed(tmp_path: Path) -> None:
    file = Activations(tmp_path / "a", 2, 2, torch.float32)
    file.append(torch.ones(2, 2, 2))
    (tmp_path / "a").write_bytes(b"\0" * 20)
    with pytest.raises(NumericalError, match="fewer than 2 windows"):
        file.read(0, 2)


def test_a_full_disk_is_a_storage_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageError, match="No space left.*--resume"):
        Activations(full, 64, 64, torch.float32).append(torch.zeros(8, 64, 64))


def test_a_file_that_was_moved_is_out_of_the_way_of_the_next(tmp_path: Path) -> None:
    file = Activations(tmp_path / "a", 2, 2, torch.float32)
    file.append(torch.ones(3, 2, 2))
    moved = file.moved(tmp_path / "b")
    Activations(tmp_path / "a", 2, 2, torch.float32).append(torch.zeros(3, 2, 2))
    assert torch.equal(moved.read(0, 3), torch.ones(3, 2, 2))
