"""What a step of training does: its windows, its learning rate, its chances, all from the seed and its number.

Nothing here remembers anything. A training that was killed at step s goes on at step s as if it never had been, and
several processes agree without a word: each takes its share of a batch that all of them know.

Windows are dealt like cards. Epoch e is one shuffle of all windows, drawn from (seed, e), and epochs lie end to end;
step s takes the next `batch_size` of them, across the end of an epoch where it comes to that. The learning rate rises
evenly and then follows a cosine down to a floor (arXiv 1608.03983, without restarts).
"""

from __future__ import annotations

import hashlib
import math

import torch
from jaxtyping import Int
from torch import Tensor


def chance(*of: int | str) -> torch.Generator:
    """A generator on the CPU that depends on these and on nothing else."""
    digest = hashlib.sha256(repr(of).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def batch_of(step: int, batch_size: int, num_windows: int, seed: int) -> Int[Tensor, " batch"]:
    """Which windows a step sees."""
    first = step * batch_size
    epochs = range(first // num_windows, (first + batch_size - 1) // num_windows + 1)
    dealt = torch.cat([torch.randperm(num_windows, generator=chance("windows", seed, epoch)) for epoch in epochs])
    start = first - epochs[0] * num_windows
    return dealt[start : start + batch_size]


def relative_rate(step: int, steps: int, warmup: float, floor: float) -> float:
    """The learning rate of a step over its peak. `warmup`: the share of steps in which it rises."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    falling = (step - rising) / (steps - rising)
    return floor + (1 - floor) * (1 + math.cos(math.pi * falling)) / 2


def cut_of(step: int, length: int, share: float, seed: int) -> int | None:
    """Where the student begins to write the windows of this step itself; None: it learns from them as they are.

    `share`: of steps in which it does. Somewhere between the second token of a window and its last.
    """
    generator = chance("on policy", seed, step)
    if float(torch.rand((), generator=generator)) >= share:
        return None
    return int(torch.randint(1, length, (), generator=generator))
