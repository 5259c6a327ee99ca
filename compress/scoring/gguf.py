"""GGUF files as models that are scored: llama.cpp computes, and what it is asked is put as of a transformers model.

The tokenizer is that of a folder beside the file, or of the baseline, since a file's own is read by transformers, which
needs the package gguf for it and does not know all that llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.gguf_file import GGUFFile
from compress.errors import ModelError, eval_package, first_line
from compress.models.store import load_tokenizer, local_folder


def is_gguf(model: Path) -> bool:
    return model.suffix == ".gguf"


def place_of(name: str) -> Path:
    """The folder or file of a model: of a folder that holds a GGUF file and no other model, that file."""
    path = local_folder(name)
    files = [*path.glob("*.gguf")] if path.is_dir() and not (path / "config.json").exists() else []
    return files[0] if len(files) == 1 else path


def head(file: Path) -> GGUFFile:
    """What stands at the beginning of a file, which is looked at whether it is whole. Raises ModelError."""
    if not file.is_file():
        raise ModelError(f"{file}: there is no such file")
    return GGUFFile(file)


def context_of_file(file: Path) -> int:
    """Tokens that the model was made for."""
    metadata = head(file).metadata
    found = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if not isinstance(found, int):
        raise ModelError(f"{file}: does not say how long its input may be")
    return found


def llama_cpp(file: Path) -> Any:
    """A file, opened. Raises ModelError where it cannot be."""
    head(file)  # says what is wrong with a damaged one, where llama.cpp says that it failed
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

    head(file)  # which says what is wrong with a file better than transformers does
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"{file}: its tokenizer cannot be read ({first_line(error)}). Put the model's tokenizer.json "
            "beside it, give the model as --baseline, or pip install gguf"
        ) from error


class ResidentFile:
    """A file that is asked as a transformers model is. It is in memory from the first question on."""

    device = torch.device("cpu")
    new_cache = None
    batch_size = 1
    """llama.cpp computes a row at a time."""

    def __init__(self, file: Path) -> None:
        from transformers import PreTrainedConfig

        self.file = file
        self.config = PreTrainedConfig(max_position_embeddings=context_of_file(file))

    @cached_property
    def model(self) -> Any:
        return llama_cpp(self.file)

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids))

    def write(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The tokens that follow by greedy search, up to an end-of-text token or so many."""
        return self.model.write(prompt, new_tokens)

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_length: int,
        stopping_criteria: Sequence[Callable[..., Any]] = (),
        do_sample: bool = False,
        **_: Any,
    ) -> Tensor:
        """A prompt [1, length], and what follows it.

        Raises ValueError where tokens are to be drawn.
        """
        if do_sample:
            raise ValueError("a GGUF file writes by greedy search, and this task draws its answers at random")
        (prompt,) = input_ids.tolist()

        def enough(written: list[int]) -> bool:
            return any(criterion(torch.tensor([prompt + written]), None) for criterion in stopping_criteria)

        return torch.tensor([prompt + self.model.write(prompt, max_length - len(prompt), enough)])
