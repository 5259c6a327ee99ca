"""A Llama of another form computes what it did before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import equal_llama
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def made(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["equal_llama", *map(str, arguments)])
    equal_llama.main()


@pytest.mark.parametrize("form", [["--hidden", 128], ["--shuffle", 3], ["--hidden", 128, "--shuffle", 3]])
def test_its_logits_are_what_they_were(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[object]
) -> None:
    made(monkeypatch, tiny, tmp_path / "equal", *form)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny, tmp_path / "equal")
    )
    wide = "--hidden" in form
    assert after.config.hidden_size == (128 if wide else before.config.hidden_size)
    assert after.config.num_attention_heads == (1 + wide) * before.config.num_attention_heads
    with torch.no_grad():
        expected, found = before(TOKENS).logits, after(TOKENS).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_every_matrix_is_in_another_order(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(monkeypatch, tiny, tmp_path / "equal", "--shuffle", 3)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tiny, tmp_path / "equal")
    )
    for name, weight in before.items():
        if weight.dim() == 2:
            assert not torch.equal(after[name], weight), name
            assert torch.equal(after[name].flatten().sort().values, weight.flatten().sort().values), name


def test_a_llama_with_biases_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(tiny, attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "biased")
    with pytest.raises(SystemExit, match="a Llama with biases"):
        made(monkeypatch, tmp_path / "biased", tmp_path / "equal", "--shuffle", 0)


def test_a_width_that_is_not_made_of_heads_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = json.loads((tiny / "config.json").read_text())["hidden_size"]
    with pytest.raises(SystemExit, match=f"--hidden {size + 1}: must be {size} or more, of heads of"):
        made(monkeypatch, tiny, tmp_path / "wide", "--hidden", size + 1)
    assert not list(tmp_path.iterdir())
