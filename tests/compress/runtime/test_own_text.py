"""A text in a model's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.cli import main
from compress.errors import OutputError, RequestError
from compress.models.store import load_tokenizer
from compress.runtime import own_text
from compress.runtime.load import load
from compress.runtime.own_text import write_text


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "BATCH", 4)


def documents(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_documents_have_the_tokens_that_were_asked_for(tiny: Path, tmp_path: Path) -> None:
    found = write_text(str(tiny), tmp_path / "own.jsonl", tokens=300, length=32)
    written = documents(tmp_path / "own.jsonl")
    assert found["documents"] == len(written)
    assert found["tokens"] == sum(document["tokens"] for document in written) >= 300
    assert all(len(load_tokenizer(tiny)(document["text"]).input_ids) > 0 for document in written)
    assert max(document["tokens"] for document in written) <= 31, "after the one that begins each"
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_tokens_are_drawn_from_what_the_model_says(tiny: Path) -> None:
    """The first token after the beginning, over many documents, is as frequent as it is probable."""
    model, tokenizer = load(tiny, dtype=torch.float32)
    first = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        model.lm_head.weight *= 2 / model(first).logits[0, -1].std()  # so that a few tokens stand out
        probable = model(first).logits[0, -1].softmax(-1)
    counts = torch.zeros(len(probable))
    own_text.BATCH = 4000
    ids = own_text._ids(model, tokenizer, 2, seed=0)
    counts.index_add_(0, ids[:, 1], torch.ones(len(ids)))
    error = (probable * (1 - probable) / 4000).sqrt()
    assert probable.max() > 10 / len(probable)
    assert ((counts / 4000 - probable).abs() < 5 * error + 1e-3).all()


def test_it_is_calibrated_on_like_any_other_text(wide: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    assert main(["write", str(wide), "--output", str(own), "--tokens", "400", "--length", "64"]) == 0
    command = ["run", "w4a16-gptq", "--model", str(wide), "--calibration", str(own), "--output", str(tmp_path / "out")]
    options = ["gptq.group_size=32", "calibration.samples=4", "calibration.sequence_length=32"]
    options += ["gates.max_perplexity_ratio=null", "evaluation.samples=1"]
    assert main([*command, *(word for option in options for word in ("--set", option))]) == 0


@pytest.mark.parametrize("left", ["whole", "torn"])
def test_what_was_killed_goes_on_and_ends_alike(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    write_text(str(tiny), tmp_path / "whole.jsonl", tokens=600, length=32)
    drawn, calls = own_text._drawn, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return drawn(*arguments)

    monkeypatch.setattr(own_text, "_drawn", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_text(str(tiny), tmp_path / "own.jsonl", tokens=600, length=32)
    assert not (tmp_path / "own.jsonl").exists()
    if left == "torn":
        (hidden,) = tmp_path.glob(".own.jsonl.*")
        hidden.write_text(hidden.read_text()[:-30])
    write_text(str(tiny), tmp_path / "own.jsonl", tokens=600, length=32)
    assert len(calls) > 3
    assert calls[3][-1] == (4 if left == "torn" else 8), "the seed of the first batch that was missing"
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_seed_writes_another_text(tiny: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_text(str(tiny), tmp_path / f"{seed}.jsonl", tokens=100, length=32, seed=seed)
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "1.jsonl").read_bytes()


def test_what_cannot_be_is_refused_before_the_model_is_loaded(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--tokens 0: must be at least 1"):
        write_text(str(tiny), tmp_path / "own.jsonl", tokens=0)
    with pytest.raises(RequestError, match=r"--output .*own\.txt: a document stands in each line of a \.jsonl file"):
        write_text(str(tiny), tmp_path / "own.txt")
    (tmp_path / "own.jsonl").write_text("kept\n")
    with pytest.raises(OutputError, match=r"own\.jsonl: exists already"):
        write_text(str(tiny), tmp_path / "own.jsonl")
    assert (tmp_path / "own.jsonl").read_text() == "kept\n"
    write_text(str(tiny), tmp_path / "own.jsonl", tokens=10, length=8, overwrite=True)
    assert documents(tmp_path / "own.jsonl")
