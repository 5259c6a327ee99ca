"""What models are scored on, read and checked before the first of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import DataError, RequestError, eval_package

PROMPT, PROMPTS = 64, 8
"""How many of a window's first tokens are a prompt to write after, and how many windows of a text give one."""


@dataclass(frozen=True)
class Asked:
    """Texts, tasks and prompts."""

    tokenizer: Any
    context: int
    limit: int | None = None
    """The most windows of a text, and questions of a task."""
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    """Tokens of texts, by name."""
    retrieved: Mapping[str, Any] = field(default_factory=dict)
    """Tasks of `eval.retrieval`, drawn."""
    tasks: Any = None
    """Those of lm-eval, loaded."""
    prompts: Sequence[list[int]] = ()
    new_tokens: int = 0
    """To write after each prompt."""


def read_asked(
    tokenizer: Any,
    context: int,
    limit: int | None,
    *,
    vocabulary: int,
    texts: Sequence[Path],
    tasks: Sequence[str],
    new_tokens: int | None,
    prompts: Path | None,
) -> Asked:
    """`vocabulary`: what the models have logits for. `prompts`: a file, each document of which is one.

    Raises RequestError and DataError where something cannot be used.
    """
    with eval_package():
        from eval.retrieval import NAMES, SAMPLES, draw
        from eval.tasks import TaskError, load_tasks
        from eval.texts import prepended_bos
    streams = read_streams(texts, tokenizer)
    special = {*tokenizer.all_special_ids}
    ids = [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]
    own = [task for task in tasks if task in NAMES]
    written = _prompts(tokenizer, streams, prompts, context, limit or PROMPTS, new_tokens)
    try:
        samples = min(limit or SAMPLES, SAMPLES)
        drawn = draw(own, ids=ids, bos=prepended_bos(tokenizer), context=context, samples=samples)
        loaded = load_tasks(others) if (others := [task for task in tasks if task not in NAMES]) else None
    except TaskError as error:
        raise RequestError(str(error)) from error
    except ValueError as error:
        raise RequestError(f"--tasks {','.join(own)}: {error}") from error
    return Asked(tokenizer, context, limit, streams, drawn, loaded, written, new_tokens or 0)


def read_streams(files: Sequence[Path], tokenizer: Any) -> dict[str, Tensor]:
    """Token streams of text files by file name. Raises DataError where one cannot be used."""
    with eval_package():
        from eval.texts import TextError
        from eval.texts import read_streams as read
    try:
        return read(files, tokenizer)
    except TextError as error:
        raise DataError(str(error)) from error


def _prompts(
    tokenizer: Any, streams: Mapping[str, Tensor], file: Path | None, context: int, limit: int, new_tokens: int | None
) -> list[list[int]]:
    """Token ids to write after: of a file's documents, or of the beginnings of each text's first windows."""
    with eval_package():
        from eval.texts import TextError, prepended_bos, read_documents, windows
    if new_tokens is None:
        if file is not None:
            raise RequestError(f"--prompt-file {file}: nothing is written after it; give --generate N")
        return []
    room = context - new_tokens
    if file is None and not streams:
        raise RequestError("--generate: there is nothing to write after; give --text FILE or --prompt-file FILE")
    if file is None and room < 2:
        raise RequestError(
            f"--generate {new_tokens}: leaves no room for a prompt in a context of {context}. Write fewer"
        )
    try:
        if file is None:
            bos = prepended_bos(tokenizer)
            cut = [windows(stream, context, bos)[:limit, : min(PROMPT, room)] for stream in streams.values()]
            return [prompt for prompts in cut for prompt in prompts.tolist()]
        prompts = [tokenizer(document).input_ids for document in read_documents(file, tokenizer)[:limit]]
    except TextError as error:
        raise DataError(str(error)) from error
    if (longest := max(map(len, prompts))) > room:
        raise DataError(
            f"{file}: has a prompt of {longest} tokens, and --generate {new_tokens} leaves room for {max(room, 0)} "
            f"in a context of {context}. Shorten it, or write fewer"
        )
    return prompts
