"""A model, ours or anyone's, as one that can be scored: from token ids to logits, or in memory.

Folders that netsuke reads are streamed block by block in float32 from their files, so a model larger than memory can
be scored, and what is scored is what ships. Formats that only their own loader reads are loaded by transformers; GGUF
files run on llama.cpp, where it is installed. Where many short questions are asked, or tokens written one at a time, a
model stays in memory: packed as it is stored, with activations in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import READERS
from compress.checkpoint.kv_cache import Scales, read_scales, scheme_of
from compress.checkpoint.torchao import weights_alone
from compress.checkpoint.weights import open_model
from compress.errors import ModelError, eval_package, first_line
from compress.models.headers import read_json
from compress.models.store import LazyModel, load_tokenizer, read_config
from compress.scoring.gguf import ResidentFile, context_of_file, file_tokenizer, is_gguf


def is_streamed(quantization: Mapping[str, Any]) -> bool:
    """Whether a folder with this `quantization_config` is streamed; of bitsandbytes FP4 is not, of torchao what rounds
    inputs."""
    foreign = not quantization.get("load_in_8bit") and quantization.get("bnb_4bit_quant_type", "nf4") != "nf4"
    foreign |= quantization.get("quant_method") == "torchao" and not weights_alone(quantization)
    return quantization.get("quant_method") in {None, *READERS} and not foreign


def tokenizer_of(model: Path, baseline: Path | None = None) -> Any:
    """A folder's tokenizer; for a GGUF file that of the baseline or of the folder it lies in, or its own."""
    return file_tokenizer(model, baseline) if is_gguf(model) else load_tokenizer(model)


def context_of(model: Path) -> int:
    """The longest window to score by default."""
    with eval_package():
        from eval.evaluate import DEFAULT_CONTEXT, default_context
    return min(DEFAULT_CONTEXT, context_of_file(model)) if is_gguf(model) else default_context(read_config(model))


@contextmanager
def opened(folder: Path, device: str = "cpu") -> Iterator[Callable[[Tensor], Tensor]]:
    """A model as a function from token ids [batch, length] to logits [batch, length, vocabulary], in float32.

    Where its keys and values are to be quantized, those of the first token are a prompt, and all others read the cache.
    """
    if is_gguf(folder):
        file = ResidentFile(folder)
        yield lambda tokens: file(tokens).logits
        return
    config = read_json(folder / "config.json")
    scheme = scheme_of(config)
    if is_streamed(config.get("quantization_config") or {}):
        model = open_model(folder, device=device)
        if model.anatomy.head is None:
            raise ModelError(f"{folder}: is an encoder without a head over the vocabulary; it has no perplexity")
        with model.streamed():
            yield _decoded(model, scheme, read_scales(model.weights)) if scheme else model.logits
        return
    with eval_package():
        from eval.evaluate import logits_of
    yield logits_of(_loaded_by_transformers(folder))


def resident(model: Path) -> Resident | ResidentFile:
    """A model in memory, to be asked many short questions, or to write."""
    return ResidentFile(model) if is_gguf(model) else Resident(model)


class Resident:
    """The transformers model of a folder, which is loaded when something is first asked of it."""

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)

    @cached_property
    def model(self) -> Any:
        said = read_json(self.folder / "config.json")
        if not is_streamed(said.get("quantization_config") or {}):
            return _loaded_by_transformers(self.folder)
        from compress.runtime.load import load

        return load(self.folder, dtype=torch.float32)[0]

    @property
    def new_cache(self) -> Callable[[], Any] | None:
        """What makes an empty cache, where keys and values are to be quantized."""
        if not scheme_of(read_json(self.folder / "config.json")):
            return None
        from compress.runtime.attention import quantized_cache

        return lambda: quantized_cache(self.model)

    def write(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The tokens that follow by greedy search, up to the end-of-text token or so many."""
        from compress.runtime.generate import greedy

        return greedy(self.model, torch.tensor([prompt]), new_tokens)[0, len(prompt) :].tolist()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _loaded_by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot load it: {first_line(error)}") from error


def _decoded(model: LazyModel, scheme: str | list[str], scales: Mapping[int, Scales]) -> Callable[[Tensor], Tensor]:
    from compress.runtime.attention import quantized_cache

    with eval_package():
        from eval.decode_path import DecodePath
    path = DecodePath(model.module, lambda: quantized_cache(model.module, scheme, scales), step=None)
    return lambda tokens: path(tokens.to(model.device))
