"""A padded Llama computes what it did before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pad_llama
import pytest
import torch
from transformers import AutoModelForCausalLM

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def padded(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pad_llama", *map(str, arguments)])
    pad_llama.main()


def test_its_logits_are_what_they_were(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded(monkeypatch, tiny, tmp_path / "wide", "--hidden", 128)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (tiny, tmp_path / "wide")
    )
    assert after.config.hidden_size == 128
    assert after.config.num_attention_heads == 2 * before.config.num_attention_heads
    with torch.no_grad():
        expected, found = before(TOKENS).logits, after(TOKENS).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_width_that_is_not_made_of_heads_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = json.loads((tiny / "config.json").read_text())["hidden_size"]
    with pytest.raises(SystemExit, match=f"--hidden {size + 1}: must be {size} or more, of heads of"):
        padded(monkeypatch, tiny, tmp_path / "wide", "--hidden", size + 1)
    assert not list(tmp_path.iterdir())
