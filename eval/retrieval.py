"""Whether a model finds again what stood far back: copying and key–value retrieval by length of context.

Perplexity hardly sees what a quantized cache does to the distant past: most tokens of a text follow from the few before
them. Here tokens are drawn at random, and one earlier place says which comes next, as in associative recall (arXiv
2312.04927) and the key–value task of RULER (arXiv 2404.06654). Those begin with words; these begin with ids, need no
tokenizer, and can be learned by a model of any size.

    key–value    k₁ v₁ k₂ v₂ … kₙ vₙ, then keys again in random order, each with its value, which is predicted
    copy         a run of tokens, and the same run again, predicted from its second token on

A model is any function from ids to logits; for a cache to matter it has to read its past from it (`eval.decode_path`).
The right tokens are given as it goes on (teacher forcing) and the most probable token is the answer, so one mistake
does not cause others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from eval.answers import Answers
from eval.evaluate import LogitsModel, ScoreError
from eval.journal import Journal, digest
from eval.paired import standard_error


class Sequences(NamedTuple):
    """Token ids, and which of them follow from earlier ones."""

    tokens: Tensor
    """int64 [samples, length]"""
    scored: Tensor
    """bool [length]"""


Task = Callable[[int, int, Generator], Sequences]
"""From length, number of samples, and a source of randomness."""
NAMES = ("recall", "copy")
"""What `draw` draws."""
SAMPLES, QUERIES = 16, 16


def key_value(
    length: int,
    samples: int,
    generator: Generator,
    *,
    keys: Sequence[int],
    values: Sequence[int],
    queries: int = 16,
    unasked: int = 0,
    bos: int | None = None,
) -> Sequences:
    """Pairs of a key and a value, then `queries` of the keys again, each followed by its value, which is scored.

    No key comes in two pairs. No query asks for the newest `unasked` pairs, so that answers lie more than 2 · unasked
    tokens before the first query. The length is that of the whole, with `bos`, the token that a model expects before a
    text, where it does. Raises ValueError where pairs and queries cannot fill it, and for ids that are both a key and a
    value.
    """
    room = length - (bos is not None)
    pairs = room // 2 - queries
    if set(keys) & set(values):
        raise ValueError("keys and values share ids, so that a value could be taken for a key; give ranges apart")
    if room % 2 or queries < 1 or unasked < 0 or pairs - unasked < queries:
        least = 2 * (2 * max(queries, 1) + max(unasked, 0)) + (bos is not None)
        raise ValueError(f"length={length}, queries={queries}, unasked={unasked}: pairs take two tokens, and each "
                         f"query one of its own that is not among the unasked. Use {least} tokens, or an even number "
                         "more, with one query at least")  # fmt: skip
    if pairs > len(set(keys)):
        raise ValueError(f"length={length} has {pairs} pairs and there are {len(set(keys))} keys, which do not repeat. "
                         f"Use at most {length - 2 * (pairs - len(set(keys)))} tokens, or more keys")  # fmt: skip
    said = _distinct(keys, samples, pairs, generator)
    answers = torch.tensor([*values])[torch.randint(len(values), (samples, pairs), generator=generator)]
    asked = _distinct(range(pairs - unasked), samples, queries, generator)
    columns = torch.cat((said, said.gather(1, asked)), dim=1), torch.cat((answers, answers.gather(1, asked)), dim=1)
    place = torch.arange(room)
    return _after(bos, torch.stack(columns, dim=2).flatten(1), (place >= 2 * pairs) & (place % 2 == 1))


def copy(length: int, samples: int, generator: Generator, *, ids: Sequence[int], bos: int | None = None) -> Sequences:
    """A run of `ids` and the same run again, of which all tokens but the first are scored.

    No id comes twice in a run, which would leave open what follows it. Raises ValueError for a length that is no two
    runs of at least 2, or needs more ids than there are.
    """
    room = length - (bos is not None)
    run = room // 2
    if room % 2 or run < 2 or run > len(set(ids)):
        low, high = 4 + (bos is not None), 2 * len(set(ids)) + (bos is not None)
        raise ValueError(f"length={length}: two equal runs of different tokens, out of {len(set(ids))}, are {low}, "
                         f"{low + 2}, … {high} tokens long. Use one of these lengths, or more ids")  # fmt: skip
    tokens = _distinct(ids, samples, run, generator)
    return _after(bos, torch.cat((tokens, tokens), dim=1), torch.arange(room) > run)


def accuracies(model: LogitsModel, sequences: Sequences, batch_size: int = 8) -> Tensor:
    """Share of each sample's scored tokens that the model puts first, float64 [samples]. Raises ScoreError."""
    shares = []
    for tokens in sequences.tokens.split(batch_size):
        logits = model(tokens)
        if logits.shape[:2] != tokens.shape or not logits.isfinite().all():
            raise ScoreError(f"for ids of shape {[*tokens.shape]} the model returned logits of shape "
                             f"{[*logits.shape]}; expected [batch, length, vocabulary] of finite numbers")  # fmt: skip
        right = logits[:, :-1].argmax(dim=-1).cpu() == tokens[:, 1:]
        shares.append(right[:, sequences.scored[1:]].double().mean(dim=1))
    return torch.cat(shares)


def retrieval(
    model: LogitsModel,
    tasks: Mapping[str, Task],
    lengths: Sequence[int],
    *,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """A row for each task and length: task, length, accuracy, standard_error, samples.

    Tasks are functions of this module with their ids filled in: `{"copy": partial(copy, ids=range(100))}`. A row
    depends on the seed and not on other rows, so that models and caches see the same tokens. Samples are what is
    independent; of a single one the standard error is None. Raises ValueError, before the model runs, and ScoreError.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples={samples}, batch_size={batch_size}: nothing is scored; use 1 or more")
    drawn = {
        (name, length): task(length, samples, torch.Generator().manual_seed(seed))
        for name, task in tasks.items()
        for length in lengths
    }
    rows = []
    for (name, length), sequences in drawn.items():
        shares = accuracies(model, sequences, batch_size)
        error = shares.std().item() / math.sqrt(samples) if samples > 1 else None
        rows.append({"task": name, "length": length, "accuracy": shares.mean().item(), "standard_error": error,
                     "samples": samples})  # fmt: skip
    return rows


def draw(
    names: Sequence[str], *, ids: Sequence[int], bos: int | None, context: int, samples: int = SAMPLES
) -> dict[str, Sequences]:
    """Tasks at a quarter of the context, at half of it, and at all of it: `copy-512` is copying in 512 tokens.

    `recall` is key–value retrieval. `ids` are what tokens are drawn from, keys and values by turns. Raises ValueError
    where there are too few.
    """
    drawn = {}
    for name in names:
        for length in (context // 4, context // 2, context):
            length -= (length - (bos is not None)) % 2
            generator = torch.Generator().manual_seed(0)
            if name == "copy":
                found = copy(length, samples, generator, ids=ids, bos=bos)
            else:
                queries = max(1, min(QUERIES, (length - 1) // 4))
                found = key_value(length, samples, generator, keys=ids[::2], values=ids[1::2], queries=queries, bos=bos)
            drawn[f"{name}-{length}"] = found
    return drawn


def answers(model: LogitsModel, asked: Mapping[str, Sequences], journal: Journal | None = None) -> dict[str, Answers]:
    """A sample is a question, and its value the share of its scored tokens that the model puts first."""
    return {name: _answered(model, sequences, journal or Journal()) for name, sequences in asked.items()}


def _answered(model: LogitsModel, sequences: Sequences, journal: Journal) -> Answers:
    questions = [digest(row.numpy().tobytes()) for row in sequences.tokens]
    shares = journal.fill(
        [digest("retrieval", question) for question in questions],
        lambda unknown: accuracies(model, Sequences(sequences.tokens[unknown], sequences.scored)).tolist(),
    )
    values = torch.tensor(shares, dtype=torch.float64)
    metrics = {"acc": values.mean().item()}
    if (error := standard_error(values)) is not None:
        metrics |= {"acc_stderr": error, "stderr": error}
    return Answers(metrics, dict(enumerate(questions)), {"acc": dict(enumerate(shares))})


def _distinct(ids: Sequence[int], samples: int, count: int, generator: Generator) -> Tensor:
    """int64 [samples, count], of which no row has an id twice."""
    different = torch.tensor(sorted(set(ids)))
    order = torch.rand(samples, len(different), dtype=torch.float64, generator=generator).argsort(dim=1)
    return different[order[:, :count]]


def _after(bos: int | None, tokens: Tensor, scored: Tensor) -> Sequences:
    if bos is None:
        return Sequences(tokens, scored)
    return Sequences(torch.cat((tokens.new_full((len(tokens), 1), bos), tokens), dim=1),
                     torch.cat((scored.new_zeros(1), scored)))  # fmt: skip
