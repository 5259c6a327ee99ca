"""Teachers: one that runs beside its student, and one that has said what it thinks before training began.

The second needs no memory, and no time in training, but it can be asked about the windows of a known list only, and
about nothing but the likeliest tokens. When it is asked, each process asks about its share of the windows and writes a
file of its own (`compress.distill.teacher_cache`); later every process reads all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from compress.distill.capture import Capture, num_blocks, open_model
from compress.distill.checkpoint import key_of
from compress.distill.features import uniform_layers
from compress.distill.losses import TopK
from compress.distill.objective import Objective, Outputs
from compress.distill.teacher_cache import Layout, TeacherCache, top_k
from compress.models.store import read_config

Teacher = Callable[[Int[Tensor, " windows"], Int[Tensor, "windows length"]], Outputs | TopK | None]
"""Answers for windows of these numbers and with these tokens."""


@dataclass(frozen=True, eq=False)
class LiveTeacher:
    model: nn.Module
    capture: Capture

    @classmethod
    def open(
        cls, path: Path, objective: Objective, num_student_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> LiveTeacher:
        """Raises ModelError where the folder is no model or has not what the objective needs."""
        model, anatomy = open_model(path, dtype)
        model.eval().requires_grad_(False).to(device)
        blocks = uniform_layers(num_student_blocks, num_blocks(model, anatomy)) if objective.hidden else ()
        return cls(model, Capture(model, anatomy, dtype, blocks, objective.relations > 0))

    @torch.no_grad()
    def __call__(self, rows: Int[Tensor, " windows"], tokens: Int[Tensor, "windows length"]) -> Outputs:
        return self.capture(self.model, tokens)


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    files: Sequence[TeacherCache]
    """Every n-th of the windows is in one of n files, in turn."""
    known: Int[Tensor, " known"]
    """The numbers of all windows it was asked about, ascending."""

    def __call__(self, rows: Int[Tensor, " windows"], tokens: Int[Tensor, "windows length"]) -> TopK:
        found = []
        for place in torch.searchsorted(self.known, rows).tolist():
            record, file = divmod(place, len(self.files))
            found.append(self.files[file].read(record, record + 1))
        indices = torch.cat([each.indices for each in found]).to(tokens.device)
        log_probs = torch.cat([each.log_probs for each in found]).to(tokens.device)
        return TopK(indices, log_probs, found[0].temperature)


def ask(
    path: Path,
    windows: Int[Tensor, "windows length"],
    rows: Int[Tensor, " known"],
    k: int,
    objective: Objective,
    micro_batch: int,
    accelerator: Any,
    dtype: torch.dtype,
    work: Path,
    tell: Callable[[str, float, str], None],
) -> CachedTeacher:
    """Ask a teacher about windows `rows`, ascending numbers, or about those for which `work` has no answer yet.

    All processes call it. Raises ModelError where the folder is no model, OutputError where `work` holds the answers
    of another.
    """
    processes, process = accelerator.num_processes, accelerator.process_index
    key = key_of([], [windows[rows]], [path])
    vocabulary = read_config(path).get_text_config().vocab_size
    layout = Layout(key, vocabulary, windows.shape[1], k, objective.temperature)
    names = [work / f"teacher-{index + 1}-of-{processes}" for index in range(processes)]
    own, cache = rows[process::processes], TeacherCache(names[process], layout)
    if cache.windows < len(own):
        teacher = LiveTeacher.open(path, objective, 0, accelerator.device, dtype)
        while (done := cache.windows) < len(own):
            tell("teacher", done / len(own), f"window {done + 1} of {len(own)}")
            part = own[done : done + micro_batch]
            said = teacher(part, windows[part].to(accelerator.device))
            cache.append(top_k(said.logits, k, objective.temperature))
        del teacher
    accelerator.wait_for_everyone()
    return CachedTeacher([TeacherCache(name, layout) for name in names], rows)
