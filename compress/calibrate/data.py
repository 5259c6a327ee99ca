"""Calibration windows: text in, token windows out, never padded, always the same for the same seed.

Documents are put in a seeded order, tokenized until there are enough tokens, joined and cut into windows of equal
length; padding would put made-up tokens into every statistic. What calibration did not use is handed back, so that a
run can be scored on text it has not seen. The hash of the tokens goes into the report.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from compress.errors import DataError, eval_package, first_line

FILES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Windows:
    """Token windows [windows, length], their hash, and the documents that no window used."""

    tokens: Int[Tensor, "windows length"]
    hash: str
    rest: Int[Tensor, " tokens"]
    """What is left of the last document that a window used."""
    unused: tuple[str, ...]


def read_dataset(name: str, split: str, tokenizer: Any) -> list[str]:
    """The documents of a local file, or of a dataset on the hub.

    Raises DataError where there is no such file or dataset, or no text in it.
    """
    with eval_package():
        from eval.texts import TextError, read_documents
    path = Path(name)
    if is_file(name):
        try:
            return read_documents(path, tokenizer)
        except TextError as error:
            raise DataError(str(error)) from error
    return _read_hub(name, split, tokenizer)


def is_file(name: str) -> bool:
    """Whether a dataset's name means a local file, there or not."""
    return Path(name).suffix in FILES or Path(name).exists()


def calibration_windows(documents: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int) -> Windows:
    """Cut `samples` windows of `length` tokens out of documents in a seeded order.

    Raises DataError where the documents hold fewer tokens than one window. Fewer windows than asked for are
    returned where the text is short; the plan and the report say how many.
    """
    with eval_package():
        from eval.texts import prepended_bos, windows
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    bos = prepended_bos(tokenizer)
    shuffled = [documents[index] for index in order]
    tokens, used = first_tokens(shuffled, tokenizer, samples * (length - (bos is not None)))
    if len(tokens) < length:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, less than one window of {length}. "
            "Give more text, or lower calibration.sequence_length"
        )
    chosen = windows(tokens, length, bos)[:samples]
    digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    rest = tokens[samples * (length - (bos is not None)) :]
    return Windows(chosen, digest, rest, tuple(documents[index] for index in sorted(order[used:])))


def first_tokens(documents: Sequence[str], tokenizer: Any, count: int) -> tuple[Int[Tensor, " tokens"], int]:
    """The stream of as many documents as it takes to have `count` tokens, and how many those are."""
    with eval_package():
        from eval.texts import tokenize
    parts: list[str] = []
    total = 0
    for document in documents:
        if total > count:
            break
        total += len(tokenize([document], tokenizer)) + 1
        parts.append(document)
    return tokenize(parts, tokenizer), len(parts)


def _read_hub(name: str, split: str, tokenizer: Any) -> list[str]:
    """Documents of a hub dataset through `datasets`: a `text` column, or chat `messages` through the template."""
    from datasets import load_dataset

    names = {"ultrachat": "HuggingFaceH4/ultrachat_200k", "wikitext": "wikitext"}
    configuration = {"wikitext": "wikitext-2-raw-v1"}.get(name)
    splits = {"ultrachat": "train_sft"}
    try:
        rows = load_dataset(names.get(name, name), configuration, split=splits.get(name, split), streaming=True)
        rows = rows.take(20_000)
        columns = set(rows.column_names or next(iter(rows)))
        if "messages" in columns:
            return [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        if "text" in columns:
            return [row["text"] for row in rows if row["text"]]
    except (OSError, ValueError, RuntimeError, KeyError, StopIteration) as error:
        raise DataError(
            f"calibration dataset {name!r}: is no file here, and the hub did not give it "
            f"({type(error).__name__}: {first_line(error)}). "
            f"Give a local file: --calibration FILE ({', '.join(FILES)})"
        ) from error
    raise DataError(f"calibration dataset {name!r}: has columns {sorted(columns)}, expected 'text' or 'messages'")
