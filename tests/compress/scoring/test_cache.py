"""By what measurements of one model are told from those of another, and that what is kept is worth keeping."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import RequestError
from compress.scoring import cache as score_cache
from compress.scoring.cache import PROGRAM, ScoreCache, default_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def place(folder: Path, *models: Path, kind: str = "windows") -> str:
    path = ScoreCache(folder).journal(kind, *models).path
    assert path is not None
    return path.name


def change_a_weight_in_the_middle(model: Path) -> None:
    file = model / "model.safetensors"
    content, times = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_the_config(model: Path) -> None:
    file = model / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_the_tokenizer(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text() + " ")


def add_an_adapter(model: Path) -> None:
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize(
    "change", [change_a_weight_in_the_middle, change_the_config, change_the_tokenizer, add_an_adapter]
)
def test_whatever_changes_a_model_makes_it_another(model: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = place(tmp_path / "cache", model)
    change(model)
    assert place(tmp_path / "cache", model) != before


def test_a_copy_elsewhere_and_its_report_are_the_same_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").write_text("{}")
    assert place(tmp_path / "cache", model) == place(tmp_path / "cache", tmp_path / "copy")


def test_a_model_alone_is_not_that_model_beside_a_baseline(model: Path, wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    pairs = [(model,), (wide,), (model, wide), (wide, model)]
    places = [place(folder, *models, kind=kind) for models in pairs for kind in ("windows", "answers")]
    assert len({*places}) == 8


@pytest.mark.parametrize("part", PROGRAM)
def test_another_program_believes_nothing_of_this_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    before = place(tmp_path / "cache", model)
    for each in PROGRAM:
        copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
        (tmp_path / "other" / each).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / each, tmp_path / "other" / each)
    monkeypatch.setattr(score_cache, "ROOT", tmp_path / "other")
    score_cache._program.cache_clear()
    assert place(tmp_path / "cache", model) == before
    changed = tmp_path / "other" / part
    changed = changed if changed.is_file() else sorted(changed.glob("*.py"))[-1]
    changed.write_text(changed.read_text() + "\n# changed\n")
    score_cache._program.cache_clear()
    try:
        assert place(tmp_path / "cache", model) != before
    finally:
        score_cache._program.cache_clear()


def test_files_are_read_once(model: Path, tmp_path: Path) -> None:
    read: list[str] = []
    for _ in range(2):
        ScoreCache(tmp_path / "cache", lambda file: read.append(file.name)).journal("windows", model)
    assert sorted(read) == sorted(file.name for file in model.iterdir())


def test_without_a_folder_nothing_is_kept_and_nothing_is_read(tmp_path: Path) -> None:
    cache = ScoreCache(None)
    journal = cache.journal("windows", tmp_path / "nowhere")
    journal.put("a", 1)
    assert journal.get("a") is None
    assert cache.summary() is None


def test_it_tells_how_much_was_there(model: Path, wide: Path, tmp_path: Path) -> None:
    ScoreCache(tmp_path).journal("answers", model).put("a", 1)
    cache = ScoreCache(tmp_path)
    for folder in (model, wide):
        journal = cache.journal("answers", folder)
        for key in "ab":
            journal.get(key)
    assert cache.summary() == {"folder": str(tmp_path), "answers": {"asked": 4, "found": 1}}


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"--cache .*file/scores: .*give --no-cache"):
        ScoreCache(tmp_path / "file" / "scores")


def test_scores_lie_where_the_user_wants_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/netsuke/scores")
    monkeypatch.setenv("HOME", "/home/someone")
    for unset in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == Path("/home/someone/.cache/netsuke/scores")
