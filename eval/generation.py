"""What models write by themselves: whether they repeat themselves, and where one leaves what another writes.

Perplexity and divergence are measured on a text that is given, token by token. A model that writes reads its own
mistakes, and what compression does there shows late: a text that turns in circles, or that parts from the original's
after a few words. Repetition is the share of 4-grams that stood in the same text before (rep-4, arXiv 1908.04319). All
texts are greedy, so that a difference is the model's, and not chance's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
from typing import Any

from eval.journal import Journal, digest

SHOWN = 8
"""Texts that are kept whole."""
TURNS, TURNED = 3, 12
"""A text ends in a loop where its last tokens, this many at least, are one phrase, this many times over at least."""

Write = Callable[[list[int]], list[int]]
"""From a prompt's tokens to those that follow, the end-of-text token among them where the text ends."""


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood before in the same text; 0 where there is none."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a text has come to repeat one phrase and nothing else."""
    for period in range(1, len(tokens) // TURNS + 1):
        turns = max(TURNS, math.ceil(TURNED / period))
        if list(tokens[-turns * period :]) == list(tokens[-period:]) * turns:
            return True
    return False


def divergence_point(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """How many tokens two texts have in common before they part; None where they never do."""
    for place, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return place
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def written(write: Write, prompts: Sequence[list[int]], new_tokens: int, journal: Journal | None = None) -> list[Any]:
    """What a model writes after each prompt; what `journal` knows is not written again."""

    def texts(unknown: list[int]) -> Iterator[list[int]]:
        return (write(prompts[place]) for place in unknown)

    keys = [digest("greedy", str(new_tokens), str(prompt)) for prompt in prompts]
    return (journal or Journal()).fill(keys, texts)


def summary(
    prompts: Sequence[list[int]],
    new_tokens: int,
    decode: Callable[[list[int]], str],
    texts: Sequence[list[int]],
    originals: Sequence[list[int]] | None = None,
) -> dict[str, Any]:
    """Of one model's texts, beside those of the original where there are any.

    `divergence_point` is the median over prompts of the new tokens that two texts have in common; None where half of
    them never part.
    """
    told: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens, **_habits(texts)}
    samples: list[dict[str, Any]] = [
        {"prompt": decode(prompt), "text": decode(text)} for prompt, text in zip(prompts[:SHOWN], texts, strict=False)
    ]
    if originals is not None:
        points = [divergence_point(*pair) for pair in zip(texts, originals, strict=True)]
        middle = median(math.inf if point is None else point for point in points)
        told |= {f"baseline_{name}": value for name, value in _habits(originals).items()}
        told |= {
            "divergence_point": middle if math.isfinite(middle) else None,
            "divergence_points": points,
            "identical": points.count(None) / len(points),
        }
        for sample, original, point in zip(samples, originals, points, strict=False):
            sample |= {"baseline_text": decode(original), "divergence_point": point}
    return {**told, "samples": samples}


def _habits(texts: Sequence[list[int]]) -> dict[str, float]:
    return {"repetition": fmean(map(repetition, texts)), "loops": fmean(map(ends_in_loop, texts))}
