"""What all tests of kernels share: memory that is not written to does not look right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator allocates holds NaN, or 77 where there is none, so that what it leaves out shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if not made.is_floating_point():
            return made.fill_(77)
        return made.view(torch.uint8).fill_(255).view(made.dtype) if made.itemsize == 1 else made.fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache for all tests that compile ahead of time: some compile the same kernel."""
    return tmp_path_factory.mktemp("compiled")
