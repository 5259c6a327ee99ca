"""Which vocabularies are the same, and which only look it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.checkpoint.gguf_file import save
from compress.errors import ModelError
from compress.models.store import load_tokenizer
from compress.scoring.vocabulary import Vocabulary, problems, vocabulary_of, words_of

WORDS = {token: f"word {token}" for token in range(1000)}


def gguf(path: Path, tokens: list[str]) -> Vocabulary:
    save(path, {"general.architecture": "llama", "tokenizer.ggml.tokens": tokens}, [], [])
    return vocabulary_of(path)


def test_words_of_a_file_beyond_the_tokenizers_are_padding(tmp_path: Path) -> None:
    padded = gguf(tmp_path / "model.gguf", [*WORDS.values(), *(f"[PAD{token}]" for token in range(1000, 1024))])
    assert padded.width == 1024
    assert not problems({"file": padded, "tokenizer": Vocabulary(1024, WORDS)})


def test_words_of_the_tokenizer_beyond_the_models_are_its_own_affair(tmp_path: Path) -> None:
    file = gguf(tmp_path / "model.gguf", [*WORDS.values()])
    assert not problems({"file": file, "tokenizer": Vocabulary(1000, WORDS | {1000: "<pad>"})})


def test_a_file_may_spell_a_few_words_otherwise_and_a_folder_none(tmp_path: Path) -> None:
    few, many = (WORDS | dict.fromkeys(range(number), "other") for number in (10, 11))
    folder = Vocabulary(1000, WORDS)
    assert not problems({"folder": folder, "file": gguf(tmp_path / "few.gguf", [*few.values()])})
    assert problems({"folder": folder, "file": gguf(tmp_path / "many.gguf", [*many.values()])})
    assert problems({"folder": folder, "other": Vocabulary(1000, few)}) == [
        "other: its tokenizer is not that of folder. Compare models that share one"
    ]


def test_a_smaller_tokenizer_of_the_same_kind_is_another(tmp_path: Path) -> None:
    """Two of sentencepiece begin alike: with special words and the 256 bytes."""
    beginning = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    file = gguf(tmp_path / "model.gguf", [*beginning, *WORDS.values()])
    small = dict(enumerate([*beginning, *(f"piece {number}" for number in range(253))]))
    assert problems({"file": file, "tokenizer": Vocabulary(file.width, small)})


def test_a_folders_width_is_that_of_its_logits(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "padded")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "padded" / "config.json").write_text(json.dumps(config | {"vocab_size": 320}))
    found = vocabulary_of(tmp_path / "padded")
    assert (found.width, found.words) == (320, words_of(load_tokenizer(tiny)))


@pytest.mark.parametrize("tokens", [{}, {"tokenizer.ggml.tokens": 7}])
def test_a_file_that_names_no_words_is_refused(tmp_path: Path, tokens: dict[str, int]) -> None:
    save(tmp_path / "model.gguf", {"general.architecture": "llama", **tokens}, [], [])
    with pytest.raises(ModelError, match=r"model\.gguf: does not say which words its tokens are"):
        vocabulary_of(tmp_path / "model.gguf")
