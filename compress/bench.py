"""How fast a model reads a prompt and writes on, and how much memory that takes; beside a baseline, in the same run.

Each model lives in a process of its own, so that its peak of memory is its own. The processes take turns, one waiting
while the other works, so that a slow minute of the machine falls on both. Ratios are medians over such pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import RequestError, RunError
from compress.models.headers import read_folder
from compress.models.store import local_folder, read_config
from compress.plan.footprint import peak_memory_so_far
from compress.runtime.decode import Decoder
from compress.runtime.load import load
from compress.runtime.modules import QuantLinear

WARM_UP = 8
"""Tokens read, and written, before the first measurement."""
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")
BYTES = ("peak_memory_bytes", "weights_bytes")

Progress = Callable[[str, float, str], None]
"""Called with the phase, the share of the whole that is done (0…1), and a few words."""


@dataclass(frozen=True)
class Work:
    """What a model is given to do: `batch` prompts of random tokens, and so many tokens to write after each."""

    prompt_tokens: int = 512
    tokens: int = 32
    batch: int = 1
    threads: int | None = None
    """Of torch on the CPU; None: as many as it takes by itself."""
    repetitions: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "tokens", "batch", "threads", "repetitions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def bench(
    model: str, *, baseline: str | None = None, work: Work | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """What `netsuke bench` prints. `ratio` is the model's values over the baseline's: speeds above 1 are faster.

    Raises ModelError where a folder cannot be loaded, RequestError where the work is longer than a model's context,
    RunError where a process dies.
    """
    work = work or Work()
    with ExitStack() as stack:
        subjects = [stack.enter_context(Subject(name)) for name in (model, baseline) if name is not None]
        for subject in subjects:
            _check_context(subject.folder, work)
        facts = [subject.call(_open, subject.folder, work) for subject in subjects]
        pairs = []
        for repetition in range(work.repetitions):
            if progress:
                progress("bench", repetition / work.repetitions, f"{repetition} of {work.repetitions} repetitions")
            prefills = [subject.call(_prefill, repetition) for subject in subjects]
            pairs.append([prefills, [subject.call(_decode) for subject in subjects]])
        for subject, known in zip(subjects, facts, strict=True):
            known["peak_memory_bytes"] = subject.call(_peak)
    seconds = torch.tensor(pairs, dtype=torch.float64)  # [repetition, prefill or decode, subject]
    counted = torch.tensor([work.prompt_tokens, work.tokens])[:, None] * work.batch
    speeds = (counted / seconds).quantile(0.5, dim=0)
    for index, known in enumerate(facts):
        known |= dict(zip(SPEEDS, speeds[:, index].tolist(), strict=True))
    result = {"model": model, "baseline": baseline} | facts[0]
    result |= {key: getattr(work, key) for key in ("prompt_tokens", "tokens", "batch", "repetitions")}
    result |= {"ratio": None, "baseline_values": None, "warning": None}
    if baseline is not None:
        faster = (seconds[:, :, 1] / seconds[:, :, 0]).quantile(0.5, dim=0)
        result["ratio"] = dict(zip(SPEEDS, faster.tolist(), strict=True))
        result["ratio"] |= {key: facts[0][key] / facts[1][key] for key in BYTES}
        result["baseline_values"] = facts[1]
        result["warning"] = warning(facts[0]["scheme"], work, result["ratio"])
    return result


def warning(scheme: str, work: Work, ratio: dict[str, float]) -> str | None:
    """One sentence where the model is slower than its baseline at the measured batch."""
    slower = [
        f"{verb} at {ratio[key]:.2f}×"
        for verb, key in zip((f"reads prompts of {work.prompt_tokens} tokens", "writes"), SPEEDS, strict=True)
        if ratio[key] < 1
    ]
    if not slower:
        return None
    saved = f"; its weights take {ratio['weights_bytes']:.2f}× the memory" if ratio["weights_bytes"] < 1 else ""
    return f"with batch {work.batch}, {scheme} {' and '.join(slower)} the speed of the baseline on this machine{saved}"


def _check_context(folder: Path, work: Work) -> None:
    """Raises RequestError where the work is longer than the model's context, ModelError where there is no model."""
    read_folder(folder)
    context = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    length = work.prompt_tokens + work.tokens
    if context is not None and length > context:
        raise RequestError(
            f"--prompt-tokens {work.prompt_tokens} --tokens {work.tokens}: are {length} together, more than the "
            f"context of {folder}, {context}. Ask for fewer"
        )


class Subject:
    """A model in a process of its own, for as long as the context lasts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = local_folder(name)
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one of the functions below in the process. Raises what it raises."""
        try:
            return self._process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RunError(f"{self.name}: its process died, most often because memory ran out") from error


@dataclass
class _State:
    """What a process holds between calls."""

    decoder: Decoder
    work: Work
    next_tokens: Tensor


_state: _State


def _open(folder: Path, work: Work) -> dict[str, Any]:
    global _state
    if work.threads:
        torch.set_num_threads(work.threads)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load(folder, device=device)
    length = work.prompt_tokens + work.tokens
    decoder = Decoder(model, length)
    _state = _State(decoder, work, _prompt(decoder, work, 0))
    _state.next_tokens = decoder.prefill(_state.next_tokens[:, :WARM_UP])
    for _ in range(min(WARM_UP, length - WARM_UP)):
        decoder.step(_state.next_tokens)
    schemes = {layer.scheme.name for layer in model.modules() if isinstance(layer, QuantLinear)}
    weights = " and ".join(sorted(schemes)) or str(model.dtype).removeprefix("torch.")
    cache = " and ".join(sorted({layer.scheme.name for layer in _packed(decoder)}))
    return {
        "scheme": f"{weights} with {cache}" if cache else weights,
        "device": device,
        "threads": torch.get_num_threads(),
        "weights_bytes": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
    }


def _prefill(repetition: int) -> float:
    """Seconds to read the prompts."""
    prompt = _prompt(_state.decoder, _state.work, repetition)
    start = _now()
    _state.next_tokens = _state.decoder.prefill(prompt)
    return _now() - start


def _decode() -> float:
    """Seconds to write tokens after them."""
    start = _now()
    for _ in range(_state.work.tokens):
        _state.next_tokens = _state.decoder.step(_state.next_tokens)
    return _now() - start


def _peak() -> int:
    """Bytes of memory held at most: of the process, or of the device where the model is on one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_so_far()


def _packed(decoder: Decoder) -> list[Any]:
    """The quantized layers of its cache."""
    return [layer for layer in decoder.cache.layers if hasattr(layer, "scheme")]


def _prompt(decoder: Decoder, work: Work, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = decoder.model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (work.batch, work.prompt_tokens), generator=generator).to(decoder.model.device)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
