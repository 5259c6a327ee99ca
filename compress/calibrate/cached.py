"""How large keys and values are when they go into the cache, which is what scales of a calibrated cache are made of."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError

if TYPE_CHECKING:
    from compress.calibrate.block import Block

NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What families, and versions of transformers, call the cache that a block is given."""


class _Recorder:
    """A cache that keeps nothing but the largest magnitudes, by head, of what it is given."""

    def __init__(self) -> None:
        self.largest: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        now = [states.abs().amax(dim=(0, 2, 3)).float() for states in (key_states, value_states)]
        self.largest = list(map(torch.maximum, self.largest, now)) if self.largest else now
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return 0


@torch.inference_mode()
def largest_cached(block: Block) -> tuple[Float[Tensor, " kv_heads"], Float[Tensor, " kv_heads"]]:
    """The largest magnitudes of keys and of values over the calibration set, keys after the rotary embedding.

    Raises NumericalError where one is not finite, or where the block writes to no cache.
    """
    recorder, signature = _Recorder(), inspect.signature(block.module.forward)
    names = [name for name in NAMES if name in signature.parameters]
    for start in range(0, block.inputs.windows if names else 0, block.batch):
        hidden = block.inputs.read(start, start + block.batch).to(block.model.device)
        call = signature.bind(hidden, *block.arguments.args, **block.arguments.kwargs)
        call.arguments[names[0]] = recorder
        block.module(*call.args, **call.kwargs)
    if not recorder.largest:
        raise NumericalError(f"{block.name}: writes no keys and values to a cache. Use a scheme that needs no "
                             "calibration, such as kv8")  # fmt: skip
    for what, largest in zip(("keys", "values"), recorder.largest, strict=True):
        if not largest.isfinite().all():
            raise NumericalError(f"{block.name}: {what} of the calibration set are NaN or infinite. Calibrate in "
                                 "float32 (calibration.dtype), or on other text")  # fmt: skip
    keys, values = recorder.largest
    return keys, values
