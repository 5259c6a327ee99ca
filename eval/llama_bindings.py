"""The two packages that bring llama.cpp into Python, made to look alike.

llama-cpp-python is what most people have, built for their machine and their GPU; cyllama has wheels. Neither is told
to use buffers of repacked weights, which crash on some processors. Where llama.cpp finds a mistake of its own it ends
the process; it is asked not to start a debugger before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.evaluate import ScoreError

F32, OFF = 0, 0
"""ggml's number of the type; llama.cpp's for no flash attention."""


os.environ.setdefault("GGML_NO_BACKTRACE", "1")


class LlamaCppError(ValueError):
    """There is no llama.cpp, or it cannot read a file."""


class UnusableError(ImportError):
    """A package is not installed, or not able to work here."""


class Decode(Protocol):
    def __call__(self, ids: list[int], *, last_only: bool = False) -> Tensor:
        """From the ids that come next to the logits [ids, vocabulary] of all, or of the last [1, vocabulary]."""


class Binding(Protocol):
    """A file, opened. Raises UnusableError where the package cannot be used, and LlamaCppError."""

    package: str
    """What it is installed as."""
    vocabulary: int
    context: int
    """Tokens that the model was made for."""

    def __init__(self, file: Path) -> None: ...

    @property
    def version(self) -> str:
        """Package and number."""

    def decoder(self, length: int) -> AbstractContextManager[Decode]:
        """Room for so many tokens, empty. Raises ScoreError, as decoding does, where llama.cpp fails."""

    def ends(self, token: int) -> bool:
        """Whether nothing is written after this token."""


def _settle(settings: Any, length: int) -> Any:
    """What both packages call alike of a context for `length` tokens."""
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.type_k = settings.type_v = F32
    settings.flash_attn_type = OFF
    return settings


@contextmanager
def _importing() -> Iterator[None]:
    """Whatever goes wrong with a package before a file is opened: libraries that do not load raise anything."""
    try:
        yield
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise UnusableError(str(error) or type(error).__name__) from error


class LlamaCppPython:
    """Through llama-cpp-python's ctypes."""

    package = "llama-cpp-python"

    def __init__(self, file: Path) -> None:
        with _importing():
            import llama_cpp

            self.version = f"{self.package} {llama_cpp.__version__}"
            self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # which must live as long as the library
            llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
        self.library = llama_cpp
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise LlamaCppError(f"{file}: llama.cpp cannot read it")
        self.words = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(self.words)
        self.context: int = llama_cpp.llama_model_n_ctx_train(self.model)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.library.llama_model_free(self.model)

    def ends(self, token: int) -> bool:
        return bool(self.library.llama_vocab_is_eog(self.words, token))

    @contextmanager
    def decoder(self, length: int) -> Iterator[Decode]:
        cpp, vocabulary = self.library, self.vocabulary
        context = cpp.llama_init_from_model(self.model, _settle(cpp.llama_context_default_params(), length))
        if not context:
            raise ScoreError(f"llama.cpp has no room for {length} tokens")
        batch = cpp.llama_batch_init(length, 0, 1)
        done = 0

        def decode(ids: list[int], *, last_only: bool = False) -> Tensor:
            nonlocal done
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, done + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = not last_only or place == len(ids) - 1
            if code := cpp.llama_decode(context, batch):
                raise ScoreError(f"llama.cpp stopped with {code} at token {done} of {length}")
            done += len(ids)
            rows = 1 if last_only else len(ids)
            values = ctypes.cast(cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * (rows * vocabulary)))
            return torch.frombuffer(values.contents, dtype=torch.float32).view(rows, vocabulary).clone()

        try:
            yield decode
        finally:
            cpp.llama_batch_free(batch)
            cpp.llama_free(context)


class Cyllama:
    """Through cyllama, which gives logits a token at a time."""

    package = "cyllama"

    def __init__(self, file: Path) -> None:
        with _importing():
            from cyllama import __version__
            from cyllama.llama import llama_cpp

            self.version = f"{self.package} {__version__}"
            llama_cpp.disable_logging()
        self.library = llama_cpp
        options = llama_cpp.LlamaModelParams()
        options.use_extra_bufts = False
        model_class = type("Model", (llama_cpp.LlamaModel,), {"n_vocab": 0})  # a context of cyllama 0.2 asks for it
        try:
            self.model: Any = model_class(str(file), options, verbose=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise LlamaCppError(f"{file}: llama.cpp cannot read it") from error
        self.words = self.model.get_vocab()
        self.vocabulary: int = self.words.n_vocab
        self.model.n_vocab = self.vocabulary
        self.context: int = self.model.n_ctx_train

    def ends(self, token: int) -> bool:
        return bool(self.words.is_eog(token))

    @contextmanager
    def decoder(self, length: int) -> Iterator[Decode]:
        settings = _settle(self.library.LlamaContextParams(), length)
        try:
            context = self.library.LlamaContext(self.model, settings, verbose=False)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ScoreError(f"llama.cpp has no room for {length} tokens: {error}") from error
        done = 0

        def decode(ids: list[int], *, last_only: bool = False) -> Tensor:
            nonlocal done
            batch = self.library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1, verbose=False)
            wanted = [len(ids) - 1] if last_only else [*range(len(ids))]
            for place, token in enumerate(ids):
                batch.add(token, done + place, [0], place >= wanted[0])
            try:
                context.decode(batch)
            except (RuntimeError, ValueError) as error:
                raise ScoreError(f"llama.cpp stopped at token {done} of {length}: {error}") from error
            done += len(ids)
            logits = torch.empty(len(wanted), self.vocabulary)
            for row, place in enumerate(wanted):  # a Python number for each is what cyllama gives, a row at a time
                logits[row] = torch.tensor(context.get_logits_ith(place))
            return logits

        try:
            yield decode
        finally:
            context.close()


BINDINGS: Sequence[type[Binding]] = (LlamaCppPython, Cyllama)
"""The first that can be used is."""
