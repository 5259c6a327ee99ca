from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.calibrate.data import calibration_windows, first_tokens, read_dataset
from compress.errors import DataError
from compress.models.store import load_tokenizer


def test_windows_are_full_start_with_bos_and_are_never_padded(tiny: Path, text: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    windows = calibration_windows(read_dataset(str(text), "", tokenizer), tokenizer, samples=6, length=32, seed=0)
    assert windows.tokens.shape == (6, 32)
    assert windows.tokens[:, 0].tolist() == [tokenizer.bos_token_id] * 6
    assert (windows.tokens[:, 1:] != tokenizer.bos_token_id).all()


def test_the_seed_decides_the_windows_and_their_hash(tiny: Path, text: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    documents = read_dataset(str(text), "", tokenizer)
    first, again, other = (
        calibration_windows(documents, tokenizer, samples=6, length=32, seed=seed) for seed in (0, 0, 1)
    )
    assert first.hash == again.hash
    assert first.hash != other.hash


def test_what_calibration_did_not_use_is_handed_back(tiny: Path, text: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    documents = read_dataset(str(text), "", tokenizer)
    windows = calibration_windows(documents, tokenizer, samples=20, length=64, seed=0)
    used = set(documents) - set(windows.unused)
    assert 0 < len(used) < len(documents)
    seen = tokenizer.decode(windows.tokens[0], skip_special_tokens=True)
    assert not any(seen[5:45] in document for document in windows.unused)


def test_a_short_text_gives_the_windows_it_has(tiny: Path, text: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    documents = read_dataset(str(text), "", tokenizer)[:1]
    assert 1 < len(calibration_windows(documents, tokenizer, samples=500, length=64, seed=0).tokens) < 20


def test_a_text_shorter_than_one_window_is_an_error(tiny: Path) -> None:
    with pytest.raises(DataError, match="less than one window of 64"):
        calibration_windows(["short"], load_tokenizer(tiny), samples=1, length=64, seed=0)


def test_no_more_documents_are_tokenized_than_needed(tiny: Path) -> None:
    stream, used = first_tokens(["abcd"] * 100, load_tokenizer(tiny), 12)
    assert used == 3
    assert len(stream) == 14


def test_chat_messages_go_through_the_template(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_dataset(str(tmp_path / "chat.jsonl"), "", tokenizer) == ["[user] hi [assistant] ho "]


def test_a_missing_file_is_an_error_that_names_it(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        read_dataset(str(tmp_path / "nothing.jsonl"), "", load_tokenizer(tiny))
