"""What a journal keeps, what it refuses to believe, and that writers do not disturb each other."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.journal import Journal, digest, packed, unpacked

VALUES = {"a": 0.1, "b": [1, [2.5, "three\nlines"]], "c": {"loss": ["float32", [2], "é"]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal")
    for key, value in VALUES.items():
        journal.put(key, value)
    return journal.path


def held(path: Path) -> dict[str, Any]:
    journal = Journal(path)
    return {key: value for key in VALUES if (value := journal.get(key)) is not None}


def test_what_is_put_is_there_in_a_later_process(path: Path) -> None:
    assert held(path) == VALUES


def test_a_new_journal_knows_nothing(tmp_path: Path) -> None:
    assert Journal(tmp_path / "journal").get("a") is None


def test_it_counts_what_is_asked_for_and_what_was_there(path: Path) -> None:
    journal = Journal(path)
    journal.get("a")
    journal.get("z")
    assert (journal.asked, journal.found) == (2, 1)


def test_the_newest_value_counts(path: Path) -> None:
    Journal(path).put("a", 7)
    assert held(path) == {**VALUES, "a": 7}


@pytest.mark.parametrize("place", range(0, 170, 13))
def test_no_changed_byte_is_believed(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    found = held(path)
    assert found.items() <= VALUES.items()
    assert len(found) >= len(VALUES) - 2


@pytest.mark.parametrize("cut", range(1, 120, 17))
def test_a_line_that_was_cut_off_costs_no_other(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    Journal(path).put("c", VALUES["c"])
    found = held(path)
    assert found.items() <= VALUES.items()
    assert {"a", "c"} <= found.keys()


def test_a_file_of_something_else_holds_nothing(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 9)
    assert held(path) == {}


def test_several_writers_share_a_file(tmp_path: Path) -> None:
    """Each with a journal and a file handle of its own, as processes have."""
    path = tmp_path / "journal"

    def write(name: str) -> None:
        journal = Journal(path)
        for number in range(100):
            journal.put(f"{name} {number}", [number / 7] * 1000)

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, "wxyz"))
    journal = Journal(path)
    assert all(journal.get(f"{name} {number}") == [number / 7] * 1000 for name in "wxyz" for number in range(100))


def test_tensors_come_back_bit_for_bit() -> None:
    tensors = {
        "loss": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "agreement": torch.tensor([True, False, True]),
        "odd": torch.tensor([math.pi, math.inf, math.nan]),
    }
    found = unpacked(packed(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor) or torch.equal(found[name].isnan(), tensor.isnan())


def test_keys_differ_where_parts_are_cut_differently() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("ab", b"c") == digest("ab", "c")
