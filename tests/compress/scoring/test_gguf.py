"""GGUF files asked as transformers models are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.errors import ModelError
from compress.models.store import load_tokenizer
from compress.pipeline.convert import convert
from compress.scoring.gguf import ResidentFile, file_tokenizer
from compress.scoring.opened import Resident, resident
from eval.texts import prepended_bos, tokenize

pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
TEXTS = ["once upon a time, there was\n\n  a carver", "", "naïve café 木彫り 🦊"]


@pytest.fixture(scope="module")
def file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny, "gguf-f32", path)
    return path


def test_its_own_tokenizer_is_that_of_the_folder(file: Path, tiny: Path) -> None:
    pytest.importorskip("gguf", reason="transformers reads a file's tokenizer by the package gguf")
    found, expected = file_tokenizer(file, None), load_tokenizer(tiny)
    assert tokenize(TEXTS, found).tolist() == tokenize(TEXTS, expected).tolist()
    assert prepended_bos(found) == prepended_bos(expected) == 0
    assert found.eos_token_id == expected.eos_token_id
    assert {**found.get_vocab(), **expected.get_vocab()} == found.get_vocab(), "transformers may add words of its own"


def test_a_tokenizer_beside_it_or_of_the_baseline_comes_first(
    file: Path, tiny: Path, tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("gguf")
    assert file_tokenizer(file, tiny).get_vocab() == load_tokenizer(tiny).get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny / name, tmp_path)
    shutil.copy(file, tmp_path)
    assert file_tokenizer(tmp_path / file.name, None).get_vocab() == load_tokenizer(tiny).get_vocab()


def test_where_there_is_none_the_error_says_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gguf")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(ModelError, match=r"model.gguf: its tokenizer cannot be read \(Please install gguf\). Put"):
        file_tokenizer(file, None)


def test_it_answers_as_the_folder_does(file: Path, tiny: Path) -> None:
    tokens = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    found, expected = resident(file), resident(tiny)
    assert isinstance(found, ResidentFile)
    assert isinstance(expected, Resident)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-3)


def test_prompts_of_different_lengths_are_continued_alike(file: Path, tiny: Path) -> None:
    ids = torch.tensor([[258 - 1, 7, 9, 11], [3, 5, 8, 13]])
    seen = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = ResidentFile(file).generate(ids, attention_mask=seen, max_length=12, pad_token_id=1, stopping_criteria=[])
    expected = Resident(tiny).generate(ids, attention_mask=seen, max_length=12, pad_token_id=1, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_answers_that_are_drawn_are_refused(file: Path) -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="draws its answers at random"):
        ResidentFile(file).generate(ids, attention_mask=ids, max_length=4, pad_token_id=1, do_sample=True)
