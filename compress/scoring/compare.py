"""Checkpoints of one vocabulary beside each other: scored on the same text and tasks, and which are worth their bytes.

What can be wrong with the request is looked for before anything is measured, and said all at once. What fails after
that costs its own row and no other. Windows are as long as the shortest context there is: all see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import ModelError, NetsukeError, RequestError, first_line
from compress.inspection import inspect
from compress.models.headers import read_folder
from compress.scoring import Progress, score
from compress.scoring.front import measures
from compress.scoring.gguf import is_gguf, place_of
from compress.scoring.opened import context_of, is_streamed
from compress.scoring.vocabulary import Vocabulary, problems, vocabulary_of

FAILURES = (NetsukeError, ImportError, OSError, RuntimeError, ValueError)
"""What the loader of one checkpoint, ours or another's, may raise."""


def compare(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    context: int | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """What `netsuke compare` prints: a row for each model, and the front of size and the first measure there is.

    `asked` is what `score` takes besides. The row of a model that failed says why, under `error`. Raises RequestError
    where the request is wrong.
    """
    names = list(dict.fromkeys(models))
    paths = _checked([*([baseline] if baseline else []), *names])
    if context is None:
        context = min(context_of(path) for path in paths.values())

    def tell(phase: str, done: float, words: str) -> None:
        if progress:
            progress(phase, (len(rows) + done) / len(names), f"{names[len(rows)]}: {words}")

    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"model": name, "bytes": _bytes(paths[name]), "format": None, "texts": [], "tasks": {}}
        try:
            row |= _held(paths[name])
            row |= score(name, baseline=baseline, context=context, progress=tell, **asked)
            del row["baseline"]
            found.append(row.pop("cache") or {})
        except FAILURES as error:
            if isinstance(error, RequestError) and not (found or isinstance(error, ModelError)):
                raise  # it is not the model that is wrong, and nothing was measured yet
            row["error"] = _reason(error)
        rows.append(row)
    sizes = {row["model"]: row["bytes"] for row in rows}
    front = next((measure.front(sizes) for measure in measures({"baseline": baseline, "models": rows})), [])
    return {"baseline": baseline, "models": rows, "pareto": front, "cache": _recalled(found)}


def _recalled(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many measurements were found in the cache, of how many, over all models; where it is."""
    told: dict[str, Any] = {}
    for kind, counts in ((kind, counts) for each in found for kind, counts in each.items()):
        if kind == "folder":
            told[kind] = counts
        else:
            before = told.get(kind, dict.fromkeys(counts, 0))
            told[kind] = {key: before[key] + count for key, count in counts.items()}
    return told


def _checked(names: Sequence[str]) -> dict[str, Path]:
    """The folders and GGUF files of models that share the vocabulary of the first.

    Raises RequestError, which says all that is wrong with any of them.
    """
    paths: dict[str, Path] = {}
    vocabularies: dict[str, Vocabulary] = {}
    told: list[str] = []
    for name in dict.fromkeys(names):
        try:
            paths[name] = place_of(name)
            told += [] if is_gguf(paths[name]) else read_folder(paths[name]).truncated
            vocabularies[name] = vocabulary_of(paths[name])
        except ModelError as error:
            told.append(str(error))
    if told := told + (problems(vocabularies) if vocabularies else []):
        raise RequestError(told)
    return paths


def _bytes(path: Path) -> int:
    return path.stat().st_size if is_gguf(path) else read_folder(path).bytes


def _held(path: Path) -> dict[str, Any]:
    """Format, bytes and bits per weight; of a format that only its own loader reads, the name."""
    if not is_gguf(path):
        quantization = read_folder(path).config.get("quantization_config") or {}
        if not is_streamed(quantization):
            return {"format": quantization["quant_method"]}
    found = inspect(path)
    return {key: found[key] for key in ("format", "bytes", "bits_per_weight") if found[key] is not None}


def _reason(error: Exception) -> str:
    """The sentence of an error of ours, the first line of another's."""
    if isinstance(error, NetsukeError):
        return str(error)
    return ": ".join(dict.fromkeys((type(error).__name__, first_line(error))))
