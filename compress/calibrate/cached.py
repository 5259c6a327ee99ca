"""What a block puts into the cache: how large it is, and what becomes of the block where it is rounded there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.hadamard import factors, kronecker
from compress.core.kv import KVScheme, rounded
from compress.errors import NumericalError

if TYPE_CHECKING:
    from compress.calibrate.block import Block

NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What families, and versions of transformers, call the cache that a block is given."""
WITHOUT = "writes no keys and values to a cache. Use a scheme that needs no calibration, such as kv8"


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


class Rounded:
    """A cache that gives keys and values back as what their codes stand for, all of them: it keeps no window."""

    def __init__(self, scheme: KVScheme) -> None:
        self.scheme = scheme

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, scheme = key_states, self.scheme
        if scheme.rotated:
            turn = factors(keys.shape[-1])
            turned = rounded(kronecker(keys.float(), turn).to(keys.dtype), scheme.keys)
            keys = kronecker(turned.float(), [matrix.T for matrix in turn]).to(keys.dtype)
        else:
            keys = rounded(keys, scheme.keys)
        return keys, rounded(value_states, scheme.values)

    def get_seq_length(self, *args: Any) -> int:
        return 0


def with_cache(block: Block, cache: Any) -> Callable[[Tensor], Tensor]:
    """The block's output for a batch of hidden states, where `cache` is given its keys and values and says what to
    attend to. Raises NumericalError where the block takes no cache."""
    signature = inspect.signature(block.module.forward)
    names = [name for name in NAMES if name in signature.parameters]
    if not names:
        raise NumericalError(f"{block.name}: {WITHOUT}")

    def run(hidden: Tensor) -> Tensor:
        call = signature.bind(hidden, *block.arguments.args, **block.arguments.kwargs)
        call.arguments[names[0]] = cache
        result = block.module(*call.args, **call.kwargs)
        return result[0] if isinstance(result, tuple) else result

    return run


@torch.inference_mode()
def largest_cached(block: Block) -> tuple[Float[Tensor, " kv_heads"], Float[Tensor, " kv_heads"]]:
    """The largest magnitudes of keys and of values over the calibration set, keys after the rotary embedding.

    Raises NumericalError where one is not finite, or where the block writes to no cache.
    """
    recorder = _Recorder()
    run = with_cache(block, recorder)
    for start in range(0, block.inputs.windows, block.batch):
        run(block.inputs.read(start, start + block.batch).to(block.model.device))
    if not recorder.largest:
        raise NumericalError(f"{block.name}: {WITHOUT}")
    for what, largest in zip(("keys", "values"), recorder.largest, strict=True):
        if not largest.isfinite().all():
            raise NumericalError(f"{block.name}: {what} of the calibration set are NaN or infinite. Calibrate in "
                                 "float32 (calibration.dtype), or on other text")  # fmt: skip
    keys, values = recorder.largest
    return keys, values
