"""AdamW for a student: which parameters go at which rate, and which decay (arXiv 1711.05101).

Matrices decay if anything does. Vectors, the gains of norms and biases, do not, and neither do learned scales and zero
points (`*.log_scale`, `*.zero_point`), which also move at a rate of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.errors import RequestError

LEARNED_GRID = (".log_scale", ".zero_point")
"""How the names of parameters end that say where a grid lies."""
BETAS = (0.9, 0.95)
"""The usual 0.999 remembers more steps than healing has."""


def parameter_groups(
    module: nn.Module, weight_decay: float, scale_rate: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Trained parameters in groups, as torch wants them, and the learning rate of each relative to that of weights."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = scales if name.endswith(LEARNED_GRID) else matrices if parameter.ndim > 1 else vectors
            group.append(parameter)
    groups = [(matrices, weight_decay, 1.0), (vectors, 0.0, 1.0), (scales, 0.0, scale_rate)]
    groups = [group for group in groups if group[0]]
    return [{"params": group, "weight_decay": decay} for group, decay, _ in groups], [rate for *_, rate in groups]


def optimizer_class(kind: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """Raises RequestError where states of 8 bits (arXiv 2110.02861) are asked for and cannot be had."""
    if kind == "adamw":
        return torch.optim.AdamW
    if device.type == "cpu":
        raise RequestError("optimizer='adamw8bit' needs a GPU, and this is a CPU: use adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RequestError(
            f"optimizer='adamw8bit' needs bitsandbytes ({error}): pip install 'netsuke[gpu]', or use adamw"
        ) from error
    return AdamW8bit


def make_optimizer(kind: str, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """Raises RequestError as `optimizer_class` does."""
    return optimizer_class(kind, device)(groups, betas=BETAS)
