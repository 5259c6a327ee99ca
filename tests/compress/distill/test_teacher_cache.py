"""A teacher on disk: what is cut, what is kept, and what a killed run leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.distill import teacher_cache as module
from compress.distill.divergences import ForwardKL
from compress.distill.losses import TopK, token_losses
from compress.distill.teacher_cache import HEADER, Layout, TeacherCache, top_k
from compress.errors import NumericalError, OutputError, StorageError

LAYOUT = Layout("a teacher and its tokens", vocabulary=50, length=6, k=4)
TOLERANCE = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}


def logits(windows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(windows, LAYOUT.length, LAYOUT.vocabulary, generator=torch.Generator().manual_seed(seed))


def beliefs(windows: int, layout: Layout = LAYOUT) -> TopK:
    return top_k(logits(windows), layout.k, layout.temperature)


def windows_of(top: TopK, start: int, stop: int) -> TopK:
    return TopK(top.indices[start:stop], top.log_probs[start:stop], top.temperature)


def assert_same(found: TopK, wanted: TopK, precision: str = "float16") -> None:
    assert found.temperature == wanted.temperature
    assert torch.equal(found.indices, wanted.indices)
    assert_close(found.log_probs, wanted.log_probs, rtol=TOLERANCE[precision], atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_top_and_the_tail_are_those_of_the_softmax(temperature: float) -> None:
    x = logits(2)
    top = top_k(x, 4, temperature, chunk_bytes=5 * 4 * LAYOUT.vocabulary)
    p = (x.double() / temperature).softmax(-1).sort(dim=-1, descending=True)
    assert torch.equal(top.indices, p.indices[..., :4])
    assert_close(top.log_probs[..., :4].double(), p.values[..., :4].log(), atol=1e-5, rtol=0)
    assert_close(top.log_probs[..., 4].double(), p.values[..., 4:].sum(-1).log(), atol=1e-5, rtol=0)


def test_a_tail_too_small_for_a_difference_from_1_is_not_lost() -> None:
    x = torch.zeros(1, 50)
    x[0, 7] = 60
    assert float(top_k(x, 1).log_probs[0, 1]) == pytest.approx(-60 + float(torch.tensor(49.0).log()), rel=1e-6)


def test_with_the_whole_vocabulary_there_is_no_tail() -> None:
    assert (top_k(logits(1), LAYOUT.vocabulary).log_probs[..., -1] == -torch.inf).all()


def test_probabilities_that_are_kept_sum_to_one_with_the_tail() -> None:
    assert_close(top_k(logits(3), 4).log_probs.exp().sum(-1), torch.ones(3, LAYOUT.length))


@pytest.mark.parametrize("k", [0, 51])
def test_more_tokens_than_there_are_cannot_be_kept(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be at least 1 and at most the vocabulary's 50"):
        top_k(logits(1), k)
    with pytest.raises(ValueError, match=f"k={k}"):
        replace(LAYOUT, k=k)


def test_logits_that_are_no_distribution_are_refused() -> None:
    x = logits(1)
    x[0, 2, 3] = torch.nan
    with pytest.raises(NumericalError, match="logits of 1 tokens"):
        top_k(x, 4)


@pytest.mark.parametrize("vocabulary", [50, 1 << 16, (1 << 16) + 1])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_what_is_appended_window_by_window_is_read_back(tmp_path: Path, precision: str, vocabulary: int) -> None:
    layout = replace(LAYOUT, precision=precision, vocabulary=vocabulary)
    top = beliefs(5)
    top.indices[0, 0, 0] = vocabulary - 1
    cache = TeacherCache(tmp_path / "teacher", layout)
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        cache.append(windows_of(top, start, stop))
    for start, stop in ((0, 5), (3, 4), (2, 2)):
        assert_same(cache.read(start, stop), windows_of(top, start, stop), precision)
    index = 2 if vocabulary <= 1 << 16 else 4
    size = layout.length * (layout.k * index + (layout.k + 1) * (4 if precision == "float32" else 2))
    assert (tmp_path / "teacher").stat().st_size == HEADER + 5 * size


def test_only_the_windows_asked_for_are_read(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "teacher", LAYOUT)
    cache.append(beliefs(5))
    size = LAYOUT.record.itemsize
    with (tmp_path / "teacher").open("r+b") as stream:
        for window in (0, 1, 3, 4):
            stream.seek(HEADER + window * size)
            stream.write(b"\xff" * size)
    assert_same(cache.read(2, 3), windows_of(beliefs(5), 2, 3))


def test_a_run_goes_on_after_the_last_window_of_an_earlier_one(tmp_path: Path) -> None:
    TeacherCache(tmp_path / "teacher", LAYOUT).append(windows_of(beliefs(5), 0, 3))
    cache = TeacherCache(tmp_path / "teacher", LAYOUT)
    assert cache.windows == 3
    cache.append(windows_of(beliefs(5), 3, 5))
    assert_same(TeacherCache(tmp_path / "teacher", LAYOUT).read(0, 5), beliefs(5))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_a_window_that_was_not_committed_is_written_again(tmp_path: Path, share: float) -> None:
    """Killed before, in the middle of or right after the records, but before the header counts them."""
    path = tmp_path / "teacher"
    TeacherCache(path, LAYOUT).append(windows_of(beliefs(5), 0, 3))
    with path.open("ab") as stream:
        stream.write(b"\xff" * int(share * 2 * LAYOUT.record.itemsize))
    cache = TeacherCache(path, LAYOUT)
    assert cache.windows == 3
    with pytest.raises(ValueError, match="holds 3 windows, not 3 to 4"):
        cache.read(3, 4)
    cache.append(windows_of(beliefs(5), 3, 5))
    assert_same(cache.read(0, 5), beliefs(5))
    assert path.stat().st_size == HEADER + 5 * LAYOUT.record.itemsize


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from compress.distill import teacher_cache
from compress.distill.teacher_cache import Layout, TeacherCache, top_k

layout = Layout("a teacher and its tokens", vocabulary=50, length=6, k=4)
top = top_k(3 * torch.randn(5, 6, 50, generator=torch.Generator().manual_seed(0)), 4)
cache = TeacherCache(Path(sys.argv[1]), layout)
cache.append(teacher_cache.TopK(top.indices[:2], top.log_probs[:2]))
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
cache.append(teacher_cache.TopK(top.indices[2:], top.log_probs[2:]))
"""


def test_a_process_killed_while_it_writes_is_carried_on(tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    result = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert path.stat().st_size > HEADER + 2 * LAYOUT.record.itemsize
    cache = TeacherCache(path, LAYOUT)
    assert cache.windows == 2
    assert_same(cache.read(0, 2), windows_of(beliefs(5), 0, 2))
    cache.append(windows_of(beliefs(5), 2, 5))
    assert_same(TeacherCache(path, LAYOUT).read(0, 5), beliefs(5))


def test_a_run_killed_while_it_begins_leaves_no_file_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "teacher"

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            TeacherCache(path, LAYOUT)
    assert not path.exists()
    assert TeacherCache(path, LAYOUT).windows == 0


def test_a_file_shorter_than_its_header_says_is_noticed_when_opened_and_when_read(tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    cache = TeacherCache(path, LAYOUT)
    cache.append(beliefs(3))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    assert_same(cache.read(0, 2), windows_of(beliefs(3), 0, 2))
    with pytest.raises(NumericalError, match="holds fewer than 3 windows"):
        cache.read(1, 3)
    with pytest.raises(OutputError, match="for 3 windows; delete it"):
        TeacherCache(path, LAYOUT)


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "another"), ("vocabulary", 51), ("length", 7), ("k", 5), ("temperature", 2.0), ("precision", "bfloat16")],
)
def test_a_file_of_another_layout_is_refused_and_what_differs_is_named(
    tmp_path: Path, field: str, value: object
) -> None:
    TeacherCache(tmp_path / "teacher", LAYOUT)
    with pytest.raises(OutputError, match=f"{field} .* ≠ {value}$"):
        TeacherCache(tmp_path / "teacher", replace(LAYOUT, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"x" * 10, b"x" * 2 * HEADER, b"NETSUKE\x01" + b"\0" * HEADER])
def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "teacher").write_bytes(content)
    with pytest.raises(OutputError, match="is no cache of a teacher"):
        TeacherCache(tmp_path / "teacher", LAYOUT)
    assert (tmp_path / "teacher").read_bytes() == content


def test_the_header_can_be_read_without_netsuke(tmp_path: Path) -> None:
    TeacherCache(tmp_path / "teacher", LAYOUT).append(beliefs(3))
    content = (tmp_path / "teacher").read_bytes()
    assert np.frombuffer(content, "<u8", 1, offset=8)[0] == 3
    assert json.loads(content[16:HEADER])["k"] == 4
    assert np.frombuffer(content, "<u2", 4, offset=HEADER).tolist() == beliefs(3).indices[0, 0].tolist()


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (TopK(torch.zeros(1, 6, 3, dtype=torch.int64), torch.zeros(1, 6, 4)), "\\[1, 6, 3\\] is not of windows"),
        (TopK(torch.zeros(1, 6, 4, dtype=torch.int64), torch.zeros(1, 6, 4)), "is not of windows \\[6, 4\\]"),
        (TopK(torch.zeros(1, 6, 4, dtype=torch.int64), torch.zeros(1, 6, 5), 2.0), "temperature 1, not 2"),
        (TopK(torch.full((1, 6, 4), 50), torch.zeros(1, 6, 5)), "tokens beyond 50"),
        (TopK(torch.zeros(1, 6, 4, dtype=torch.int64), torch.ones(1, 6, 5)), "above 0 or NaN"),
        (TopK(torch.zeros(1, 6, 4, dtype=torch.int64), torch.full((1, 6, 5), torch.nan)), "above 0 or NaN"),
    ],
)
def test_what_does_not_belong_into_the_file_is_refused_and_nothing_is_written(
    tmp_path: Path, top: TopK, message: str
) -> None:
    cache = TeacherCache(tmp_path / "teacher", LAYOUT)
    with pytest.raises((ValueError, NumericalError), match=message):
        cache.append(top)
    assert cache.windows == 0
    assert (tmp_path / "teacher").stat().st_size == HEADER


def test_a_full_disk_is_a_storage_error_and_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(tmp_path / "teacher", LAYOUT)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            cache.append(beliefs(1))
    assert cache.windows == 0
    assert TeacherCache(tmp_path / "teacher", LAYOUT).windows == 0


def test_a_key_that_does_not_fit_the_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is too long; use a hash"):
        TeacherCache(tmp_path / "teacher", replace(LAYOUT, key="x" * HEADER))


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-6), ("float16", 3e-3), ("bfloat16", 3e-2)])
def test_a_student_learns_from_the_file_what_it_would_from_the_teacher(
    tmp_path: Path, precision: str, most: float
) -> None:
    """With the whole vocabulary kept, the loss differs by no more than the rounding of logarithms."""
    layout = replace(LAYOUT, k=LAYOUT.vocabulary, precision=precision)
    cache = TeacherCache(tmp_path / "teacher", layout)
    cache.append(top_k(logits(3), layout.k))
    student = logits(3, seed=1)
    found = token_losses(student, cache.read(0, 3), ForwardKL())
    wanted = token_losses(student, logits(3), ForwardKL())
    assert ((found - wanted).abs() / wanted).max() < most
