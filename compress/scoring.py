"""Scoring of folders: ours, an original, or anyone's.

Folders that netsuke reads are streamed block by block in float32 from their files, so a model larger than memory can
be scored, and what is scored is what ships. Formats that only their own loader reads are loaded by transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import READERS
from compress.checkpoint.kv_cache import Scales, read_scales, scheme_of
from compress.checkpoint.weights import open_model
from compress.errors import DataError, ModelError, NumericalError, RequestError, eval_package
from compress.models.headers import read_json
from compress.models.store import LazyModel, load_tokenizer, local_folder, read_config

Progress = Callable[[str, float, str], None]
"""Called with the phase, the share of the whole that is done (0…1), and a few words."""


def is_streamed(quantization: Mapping[str, Any]) -> bool:
    """Whether a folder with this `quantization_config` is streamed; of bitsandbytes FP4 is not."""
    foreign = not quantization.get("load_in_8bit") and quantization.get("bnb_4bit_quant_type", "nf4") != "nf4"
    return quantization.get("quant_method") in {None, *READERS} and not foreign


@contextmanager
def opened(folder: Path, device: str = "cpu") -> Iterator[Callable[[Tensor], Tensor]]:
    """A folder as a function from token ids [batch, length] to logits [batch, length, vocabulary], in float32.

    Where its keys and values are to be quantized, those of the first token are a prompt, and all others read the cache.
    """
    config = read_json(folder / "config.json")
    quantization, scheme = config.get("quantization_config") or {}, scheme_of(config)
    if is_streamed(quantization):
        model = open_model(folder, device=device)
        if model.anatomy.head is None:
            raise ModelError(f"{folder}: is an encoder without a head over the vocabulary; it has no perplexity")
        with model.streamed():
            yield _decoded(model, scheme, read_scales(model.weights)) if scheme else model.logits
        return
    from transformers import AutoModelForCausalLM

    with eval_package():
        from eval.evaluate import logits_of
    yield logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def _decoded(model: LazyModel, scheme: str | list[str], scales: Mapping[int, Scales]) -> Callable[[Tensor], Tensor]:
    from compress.runtime.attention import quantized_cache

    with eval_package():
        from eval.decode_path import DecodePath
    path = DecodePath(model.module, lambda: quantized_cache(model.module, scheme, scales), step=None)
    return lambda tokens: path(tokens.to(model.device))


def score_streams(
    model: Path,
    baseline: Path | None,
    tokenizer: Any,
    texts: Mapping[str, Tensor],
    *,
    context: int,
    limit: int | None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Score token streams by name; with a baseline, both models see the same tokens."""
    with eval_package():
        from eval.evaluate import ScoreError, default_batch_size, score_texts

    batch = default_batch_size(context, read_config(model).get_text_config().vocab_size)

    def tell(name: str, done: int, total: int) -> None:
        if progress:
            progress("score", done / total, f"{name}: {done} of {total} windows")

    measure = partial(
        score_texts,
        tokenizer=tokenizer,
        texts=texts,
        context=context,
        limit=limit,
        batch_size=batch,
        progress=tell,
    )
    try:
        with opened(model, device) as logits:
            if baseline is None:
                return measure(logits)
            with opened(baseline, device) as original:
                return measure(logits, baseline=original)
    except ScoreError as error:
        raise NumericalError(str(error)) from error


def read_streams(files: Sequence[Path], tokenizer: Any) -> dict[str, Tensor]:
    """Token streams of text files by file name. Raises DataError where one cannot be used."""
    with eval_package():
        from eval.texts import TextError
        from eval.texts import read_streams as read
    try:
        return read(files, tokenizer)
    except TextError as error:
        raise DataError(str(error)) from error


def score(
    model: str,
    *,
    baseline: str | None = None,
    texts: Sequence[Path] = (),
    tasks: Sequence[str] = (),
    context: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `netsuke eval` prints: texts and tasks of one folder or hub id, against a baseline where one is given."""
    if not texts and not tasks:
        raise RequestError("nothing to score: give --text FILE, or --tasks a,b")
    for option, value, least in (("--context", context, 2), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise RequestError(f"{option} {value}: must be at least {least}")
    folder = local_folder(model)
    tokenizer = load_tokenizer(folder)
    original = local_folder(baseline) if baseline else None
    with eval_package():
        from eval.evaluate import default_context
    length = context or default_context(read_config(folder))
    scores = []
    if texts:
        streams = read_streams(texts, tokenizer)
        scores = score_streams(folder, original, tokenizer, streams, context=length, limit=limit, progress=progress)
    return {
        "model": model,
        "baseline": baseline,
        "texts": scores,
        "tasks": _tasks(folder, tokenizer, tasks, limit) if tasks else {},
    }


def _tasks(folder: Path, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict[str, Any]:
    from compress.runtime.load import load

    with eval_package():
        from eval.tasks import TaskError, run_tasks
    try:
        return run_tasks(load(folder)[0], tokenizer, list(tasks), limit)
    except TaskError as error:
        raise RequestError(str(error)) from error
