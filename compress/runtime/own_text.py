"""A text in a model's own words: what to calibrate on where there is none like those that the model will read.

Documents are drawn token by token from what the model says itself, at temperature 1 with nothing cut off, from its
beginning-of-text token until it ends them: samples of the distribution that it was trained to have, which is what a
calibration wants to know (arXiv 2410.17170). What it is worth beside other texts: recipes/RESULTS.md.

The model is in memory, packed as it is stored. Documents are kept as they are drawn, a batch at a time, in a hidden
file beside the one that appears when all of them are there; the same command goes on after the last whole batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from compress.errors import ModelError, OutputError, RequestError, writing
from compress.models.store import device_named, local_folder
from compress.runtime.load import load

BATCH = 32
"""Documents that are drawn at a time."""


def write_text(
    model: str,
    output: str | Path,
    *,
    tokens: int = 131_072,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[str, float, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write documents of at most `length` tokens to a .jsonl file, as many as have `tokens` together, and say how many.

    Raises RequestError where the numbers make no sense, the file is there, or the model writes no text.
    """
    file = Path(output)
    for option, value, least in (("--tokens", tokens, 1), ("--length", length, 2)):
        if value < least:
            raise RequestError(f"{option} {value}: must be at least {least}")
    if file.suffix != ".jsonl":
        raise RequestError(f"--output {output}: a document stands in each line of a .jsonl file. Call it so")
    if file.exists() and not overwrite:
        raise OutputError(f"{output}: exists already. Choose another --output, or give --overwrite")
    path = local_folder(model)
    loaded, tokenizer = load(path, device=device_named(device))
    if not getattr(loaded, "can_generate", bool)():
        raise ModelError(f"{model}: is a model that writes no text. Calibrate it on one")
    length = min(length, getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or length)
    said = sha256(json.dumps([str(path.resolve()), length, seed, BATCH]).encode()).hexdigest()[:12]
    unfinished = file.with_name(f".{file.name}.{said}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        documents = _begun(unfinished)
        with unfinished.open("a", encoding="utf-8") as stream:
            while (drawn := sum(document["tokens"] for document in documents)) < tokens:
                progress("write", drawn / tokens, f"{drawn:,} of {tokens:,} tokens")
                batch = [*_drawn(loaded, tokenizer, length, seed * 1_000_003 + len(documents))]
                stream.write("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in batch))
                stream.flush()
                documents += batch
        unfinished.replace(file)
    return {"model": model, "output": str(file), "documents": len(documents), "tokens": drawn}


def _begun(file: Path) -> list[dict[str, Any]]:
    """The whole batches of a file that was begun, to which it is cut back."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    whole = whole[: len(whole) // BATCH * BATCH]
    file.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _drawn(model: Any, tokenizer: Any, length: int, seed: int) -> Iterator[dict[str, Any]]:
    """A batch of documents, each with the number of tokens that it was drawn as."""
    ends = _ends(model)
    for row in _ids(model, tokenizer, length, seed)[:, 1:].tolist():
        size = next((place for place, token in enumerate(row) if token in ends), len(row))
        yield {"text": tokenizer.decode(row[:size], skip_special_tokens=True), "tokens": size}


@torch.inference_mode()
def _ids(model: Any, tokenizer: Any, length: int, seed: int) -> Int[Tensor, "documents length"]:
    """The tokens of a batch, after the one that begins a text, or where there is none, any."""
    from transformers import GenerationConfig

    first, ends = tokenizer.bos_token_id, _ends(model)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, bos_token_id=first,
        eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = torch.randint(len(tokenizer), (BATCH, 1)) if first is None else torch.full((BATCH, 1), first)
        start = start.to(model.device)
        return model.generate(start, attention_mask=torch.ones_like(start), generation_config=config)


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    said = model.generation_config.eos_token_id
    return [] if said is None else [said] if isinstance(said, int) else list(said)
