"""GGUF files as models that are scored: llama.cpp computes, and what it is asked is put as of a transformers model.

The tokenizer is that of a folder beside the file, or of the baseline, since a file's own is read by transformers, which
needs the package gguf for it and does not know all that llama.cpp does.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compress.errors import ModelError, eval_package
from compress.models.store import load_tokenizer


def is_gguf(model: Path) -> bool:
    return model.suffix == ".gguf"


def llama_cpp(file: Path) -> Any:
    """A file as it is now, opened once. Raises ModelError where it cannot be."""
    if not file.is_file():
        raise ModelError(f"{file}: there is no such file")
    return _opened(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _opened(file: Path, _: int) -> Any:
    with eval_package():
        from eval.llama_bindings import LlamaCppError
        from eval.llama_cpp import LlamaCpp
    try:
        return LlamaCpp(file)
    except LlamaCppError as error:
        raise ModelError(str(error)) from error


def file_tokenizer(file: Path, baseline: Path | None) -> Any:
    """That of the baseline or of the folder in which the file lies, or its own."""
    for folder in (baseline, file.parent):
        if folder and (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    from transformers import AutoTokenizer

    llama_cpp(file)  # which says what is wrong with a file better than transformers does
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"{file}: its tokenizer cannot be read ({str(error).splitlines()[0]}). Put the model's tokenizer.json "
            "beside it, give the model as --baseline, or pip install gguf"
        ) from error


class ResidentFile:
    """A file in memory, which is asked as a transformers model is."""

    device = torch.device("cpu")
    new_cache = None

    def __init__(self, file: Path) -> None:
        self.model = llama_cpp(file)
        self.config = PreTrainedConfig(vocab_size=self.model.vocabulary, max_position_embeddings=self.model.context)

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids))

    def write(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The tokens that follow by greedy search, up to an end-of-text token or so many."""
        return self.model.write(prompt, new_tokens)

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        max_length: int,
        pad_token_id: int,
        do_sample: bool = False,
        **_: Any,
    ) -> Tensor:
        """Prompts [b, length], padded on the left, and what follows each, padded on the right.

        Raises ValueError where tokens are to be drawn.
        """
        if do_sample:
            raise ValueError("a GGUF file writes by greedy search, and this task draws its answers at random")
        room = max_length - input_ids.shape[1]
        found = torch.full((len(input_ids), max_length), pad_token_id)
        found[:, : input_ids.shape[1]] = input_ids
        for row, (ids, seen) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            written = torch.tensor(self.write(ids[seen].tolist(), room))
            found[row, input_ids.shape[1] :][: len(written)] = written
        return found
