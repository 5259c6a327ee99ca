"""Whether models can be asked the same: their logits are over one vocabulary, in which every token has the same id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.models.store import load_tokenizer, read_config
from compress.scoring.gguf import head, is_gguf

NEARLY = 0.99
"""The least share of words that a GGUF file has to spell as the tokenizer does: some special ones it may not."""


@dataclass(frozen=True)
class Vocabulary:
    width: int
    """Of the logits."""
    words: Mapping[int, str]
    nearly: bool = False
    """Whether some words are spelled in a way of their own."""

    def unlike(self, name: str, other: Vocabulary, its_name: str) -> str | None:
        """Why this one, called `name`, cannot stand beside another."""
        if self.width != other.width:
            return (
                f"{name}: has a vocabulary of {self.width:,}, {its_name} one of {other.width:,}. "
                "Compare models that share one"
            )
        common = self.words.keys() & other.words.keys()
        alike = sum(self.words[token] == other.words[token] for token in common)
        if alike < len(common) * (NEARLY if self.nearly or other.nearly else 1):
            return f"{name}: its tokenizer is not that of {its_name}. Compare models that share one"
        return None


def vocabulary_of(model: Path) -> Vocabulary:
    """That of a folder or a GGUF file. Raises ModelError where it cannot be read."""
    if is_gguf(model):
        words = _words_of_file(model)
        return Vocabulary(len(words), dict(enumerate(words)), nearly=True)
    return Vocabulary(width_of(model), words_of(load_tokenizer(model)))


def width_of(model: Path) -> int:
    """Of the logits of a folder or a GGUF file, for which no tokenizer is needed."""
    return len(_words_of_file(model)) if is_gguf(model) else read_config(model).get_text_config().vocab_size


def words_of(tokenizer: Any) -> dict[int, str]:
    return {token: word for word, token in tokenizer.get_vocab().items()}


def _words_of_file(file: Path) -> list[str]:
    words = head(file).metadata.get("tokenizer.ggml.tokens")
    if not words or not isinstance(words, list):
        raise ModelError(f"{file}: does not say which words its tokens are. Convert the model anew")
    return words


def problems(models: Mapping[str, Vocabulary]) -> list[str]:
    """What keeps models, by name, from being asked the same as the first of them."""
    its_name, first = next(iter(models.items()))
    return [told for name, each in models.items() if (told := each.unlike(name, first, its_name))]
