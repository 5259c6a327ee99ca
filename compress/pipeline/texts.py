"""The texts of a run: what it calibrates on, what it is scored on, and what is left to train on.

The first two are read before the work begins, and enough of the third to know that it is there. No document of the
calibration text serves two of these purposes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from compress.calibrate.data import Windows, calibration_windows, first_tokens, is_file, read_dataset
from compress.errors import DataError
from compress.models.store import load_tokenizer
from compress.plan import Plan
from compress.recipe import Calibration
from compress.scoring.asked import read_streams

HELD_OUT = 16
"""Windows that a training is watched on, which it does not see."""


@dataclass(frozen=True)
class Texts:
    """What a run reads of text."""

    tokenizer: Any
    windows: Windows
    """To calibrate on."""
    streams: dict[str, Tensor]
    """To score on, by name."""
    unused: tuple[str, ...]
    """Documents that are neither."""

    @classmethod
    def read(cls, plan: Plan) -> Texts:
        """Raises DataError where there is not enough of it."""
        tokenizer = load_tokenizer(plan.original.path)
        windows = _windows(plan, tokenizer)
        options = plan.recipe.evaluation
        if options.text:
            streams = read_streams([Path(name) for name in options.text], tokenizer)
            return cls(tokenizer, windows, streams, windows.unused)
        if plan.anatomy.head is None:
            return cls(tokenizer, windows, {}, windows.unused)
        wanted = options.samples * (options.sequence_length or plan.context)
        more, taken = first_tokens(windows.unused, tokenizer, wanted - len(windows.rest))
        stream = torch.cat([windows.rest, more])
        streams = {"held-out calibration text": stream} if len(stream) > 1 else {}
        return cls(tokenizer, windows, streams, windows.unused[taken:])

    def for_training(
        self, dataset: str | None, tokens: int, length: int, calibration: Calibration
    ) -> tuple[Int[Tensor, "windows length"], Int[Tensor, "held_out length"]]:
        """Windows to train on, as many as `tokens` fill and the text has, and others to watch the training on.

        `dataset`: None, or the calibration's own, for what is left of that text. Raises DataError where that is too
        little.
        """
        documents = list(self.unused)
        if dataset not in (None, calibration.dataset):
            documents = read_dataset(dataset, calibration.split, self.tokenizer)
        wanted = HELD_OUT + -(-tokens // length)
        try:
            found = calibration_windows(
                documents, self.tokenizer, samples=wanted, length=length, seed=calibration.seed + 1
            ).tokens
        except DataError as error:
            raise DataError(f"nothing is left to train on: {error}") from error
        watched = min(HELD_OUT, max(1, len(found) // 8))
        if len(found) <= watched:
            raise DataError(f"the training text holds {len(found)} windows of {length} tokens. Give more text")
        return found[watched:], found[:watched]


def _windows(plan: Plan, tokenizer: Any) -> Windows:
    """Calibration windows, or, where no stage needs any, a few random ones to verify the checkpoint with."""
    options = plan.recipe.calibration
    if plan.recipe.calibrated:
        documents = read_dataset(options.dataset, options.split, tokenizer)
        return calibration_windows(
            documents, tokenizer, samples=plan.windows, length=plan.sequence_length, seed=options.seed
        )
    generator = torch.Generator().manual_seed(options.seed)
    size = (plan.windows, plan.sequence_length)
    tokens = torch.randint(0, len(tokenizer), size, generator=generator)
    unused: tuple[str, ...] = ()
    if is_file(options.dataset):
        unused = tuple(read_dataset(options.dataset, options.split, tokenizer))
    return Windows(tokens, f"random-{options.seed}", tokens.new_empty(0), unused)
