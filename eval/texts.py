"""Texts to score: files to documents, documents to one stream of tokens, the stream to windows.

A perplexity is a number about a model *and* a way of cutting text; here is the cut, once. Documents are
joined by the end-of-text token into one stream; the stream is cut into windows of `context` tokens that do
not overlap. A tokenizer that puts a BOS token before a text taught its model to expect one, so every window
then starts with BOS, followed by `context - 1` tokens of text. The tokens left over at the end are dropped,
unless they are all there is. A window predicts every token but its first.

A `.txt` file is one document, line breaks as they are (WikiText is scored this way); a `.jsonl` or `.parquet`
file holds a document per row, as `text` or as chat `messages`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".txt", ".parquet")


class TextError(ValueError):
    """A text cannot be found, read, or used for scoring."""


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents of a file that are not empty, in order.

    Chat `messages` are rendered with the chat template of `tokenizer`. Raises TextError where the file is
    missing, of a kind we do not read, malformed, or without text.
    """
    if path.suffix not in SUFFIXES:
        raise TextError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise TextError(f"{path}: there is no such file; check the path")
    if path.suffix == ".txt":
        documents = [_decode(path)]
    else:
        rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
        documents = [_document(row, where, tokenizer) for where, row in rows]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{path}: there is no text in it")
    return documents


def tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All documents as one stream of ids [tokens], an end-of-text token between two documents.

    A tokenizer without an end-of-text token separates them by an empty line.
    """

    def ids(text: str) -> list[int]:
        # verbose=False: a document longer than the model's context is what we expect, not a mistake.
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    end = tokenizer.eos_token_id
    separator = ids("\n\n") if end is None else [end]
    stream: list[int] = []
    for index, document in enumerate(documents):
        stream += (separator if index else []) + ids(document)
    return torch.tensor(stream, dtype=torch.long)


def read_streams(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The token stream of each file by file name, or by path where two files share a name."""
    num_with_name = Counter(path.name for path in paths)
    names = [path.name if num_with_name[path.name] == 1 else str(path) for path in paths]
    return {name: tokenize(read_documents(path, tokenizer), tokenizer) for name, path in zip(names, paths, strict=True)}


def prepended_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if the tokenizer puts one before a text by itself, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None


def windows(tokens: Tensor, context: int, bos: int | None = None) -> Tensor:
    """Cuts a stream [tokens] into windows [n, context] that do not overlap, `bos` first in each if given.

    A stream shorter than one window gives one short window. Raises TextError if nothing is left to predict.
    """
    if context < 2:
        raise TextError(f"context={context}: a window of fewer than 2 tokens predicts none; use 2 or more")
    width = context if bos is None else context - 1
    count = len(tokens) // width
    cut = tokens[: count * width].view(count, width) if count else tokens.unsqueeze(0)
    if bos is not None:
        cut = torch.cat([cut.new_full((len(cut), 1), bos), cut], dim=1)
    if cut.shape[1] < 2:
        raise TextError(f"a text of {len(tokens)} tokens leaves none to predict; use a longer text")
    return cut


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise TextError(f"{path}:{number}: not JSON ({error}); mend or remove this line") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            batches = file.iter_batches(columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}: row {number}", row
    except ArrowInvalid as error:
        raise TextError(f"{path}: not a parquet file ({error}); write it again") from error


def _document(row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(row, Mapping):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("messages"), list):
            return _render(row["messages"], where, tokenizer)
    raise TextError(f"{where}: needs 'text' (a string) or 'messages' (a list)")


def _render(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or tokenizer.chat_template is None:
        raise TextError(f"{where}: 'messages' need a tokenizer with a chat template; give 'text' instead")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise TextError(f"{where}: the chat template refuses these messages ({error})") from error
    # Windows get their BOS from `windows`; one written by the template would be a second.
    return text.removeprefix(tokenizer.bos_token or "")
