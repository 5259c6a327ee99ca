"""A GGUF file as llama.cpp computes with it, beside the folder that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.models.store import load_tokenizer
from compress.pipeline.convert import convert
from compress.scoring.opened import opened
from eval.llama_cpp import LlamaCpp, LlamaCppError, Tokenizer
from eval.texts import prepended_bos, tokenize

TEXTS = ["once upon a time, <s> there was\n\n  a carver", "", "naïve café 木彫り 🦊"]


def test_without_cyllama_the_error_says_how_to_install_it(tmp_path: Path, without: Callable[[str], None]) -> None:
    without("cyllama")
    with pytest.raises(LlamaCppError, match="model.gguf: GGUF files run on llama.cpp .*; pip install cyllama"):
        LlamaCpp(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny, "gguf-f32", path)
    return path


@pytest.mark.parametrize("length", [1, 2, 64])
def test_its_logits_are_those_of_the_folder(file: Path, tiny: Path, length: int) -> None:
    tokens = torch.randint(2, 258, (3, length), generator=torch.Generator().manual_seed(length))
    with opened(tiny) as model:
        expected = model(tokens)
    found = LlamaCpp(file)(tokens)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_windows_do_not_see_each_other(file: Path) -> None:
    tokens = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(0))
    model = LlamaCpp(file)
    assert torch.equal(model(tokens)[1:], model(tokens[1:]))


def test_it_knows_how_long_its_input_may_be_and_how_wide_its_logits_are(file: Path) -> None:
    model = LlamaCpp(file)
    assert (model.context, model.vocabulary) == (64, 258)


def test_its_tokenizer_is_that_of_the_folder(file: Path, tiny: Path) -> None:
    found, expected = Tokenizer(LlamaCpp(file)), load_tokenizer(tiny)
    assert tokenize(TEXTS, found).tolist() == tokenize(TEXTS, expected).tolist()
    assert prepended_bos(found) == prepended_bos(expected) == 0
    assert (len(found), found.eos_token_id) == (len(expected), expected.eos_token_id)
    assert found.all_special_ids == sorted(expected.all_special_ids)


def test_a_file_that_is_none_is_refused_by_name(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LlamaCppError, match=r"bad\.gguf: llama\.cpp cannot read it"):
        LlamaCpp(tmp_path / "bad.gguf")
