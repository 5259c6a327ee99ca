"""A GGUF file as llama.cpp computes with it, through cyllama, whose wheels have it compiled (`pip install cyllama`).

Weights are multiplied as llama.cpp multiplies them, which rounds activations to 8 bits where weights are quantized.
Keys and values are kept in float32, since how a cache is kept is no property of the file.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

F32, OFF = 0, 0
"""ggml's number of the type; llama.cpp's for no flash attention."""


class LlamaCppError(ValueError):
    """cyllama is not installed, or llama.cpp cannot read a file."""


class LlamaCpp:
    """A file as a `LogitsModel`."""

    def __init__(self, file: Path) -> None:
        try:
            from cyllama.llama import llama_cpp
        except ImportError as error:
            raise LlamaCppError(f"{file}: GGUF files run on llama.cpp ({error}); pip install cyllama") from error
        llama_cpp.disable_logging()
        options = llama_cpp.LlamaModelParams()
        options.use_extra_bufts = False  # repacked weights crash on some processors
        model_class = type(
            "Model", (llama_cpp.LlamaModel,), {"n_vocab": 0}
        )  # cyllama 0.2 looks there for what it knows
        try:
            self.model: Any = model_class(str(file), options, verbose=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise LlamaCppError(f"{file}: llama.cpp cannot read it: {error}") from error
        self.vocabulary: int = self.model.get_vocab().n_vocab
        self.model.n_vocab = self.vocabulary
        self.context: int = self.model.n_ctx_train
        """Tokens that the model was made for."""
        self.llama_cpp = llama_cpp

    def __call__(self, input_ids: Tensor, /) -> Tensor:
        settings = self.llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length = input_ids.shape[1]
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = OFF
        logits = torch.empty(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            context = self.llama_cpp.LlamaContext(self.model, settings, verbose=False)
            batch = self.llama_cpp.LlamaBatch(n_tokens=length, embd=0, n_seq_max=1, verbose=False)
            for place, token in enumerate(ids):
                batch.add(token, place, [0], True)
            context.decode(batch)
            for place in range(length):
                logits[row, place] = torch.tensor(context.get_logits_ith(place))
            context.close()
        return logits


class Tokenizer:
    """The tokenizer that a file brings, as far as texts need one."""

    chat_template = None

    def __init__(self, model: LlamaCpp) -> None:
        self.model = model  # which the vocabulary lives in
        self.vocabulary: Any = model.model.get_vocab()
        self.bos_token_id, self.eos_token_id = (
            token if token >= 0 else None for token in (self.vocabulary.token_bos(), self.vocabulary.token_eos())
        )

    @property
    def all_special_ids(self) -> list[int]:
        return [token for token in range(len(self)) if self.vocabulary.is_control(token)]

    def __len__(self) -> int:
        return self.vocabulary.n_vocab

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.vocabulary.tokenize(text, add_special_tokens, True))
