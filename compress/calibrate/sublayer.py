"""Attention, or an MLP, that need not be run again.

Once nothing before its last linear changes any more, a sublayer is worth only what that linear is fed. Those inputs
are kept in a file while they are observed, so later passes start the sublayer at its last linear; and once that one is
final too, its outputs are kept instead. Attention over the calibration set is so computed once per block.

That the sublayer's output really is its last linear's output is looked at, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.activations import Activations


class Sublayer:
    """A sublayer of a block, and what is kept of it.

    `norm`: what feeds this sublayer and nothing else, if anything does. `outputs`: None where no pass would read them.
    """

    def __init__(
        self,
        module: nn.Module,
        linear: nn.Module,
        norm: nn.Module | None,
        inputs: Activations,
        outputs: Activations | None,
    ) -> None:
        self.inputs = inputs
        self._outputs = outputs
        self._module = module
        self._linear = linear
        self._norm = norm
        self._wrap: Any = None

    @contextmanager
    def examined(self) -> Iterator[None]:
        """Within, the sublayer is run once, and watched for how it wraps its last linear's output."""
        seen: list[Tensor] = []

        def close(_module: nn.Module, _args: Any, result: Any) -> None:
            self._wrap = _wrapping(result, seen[-1])

        hooks = [
            self._linear.register_forward_hook(lambda _module, _args, result: seen.append(result)),
            self._module.register_forward_hook(close),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def resumable(self) -> bool:
        return self._wrap is not None

    def changed(self) -> None:
        """The last linear is another one now."""
        if self._outputs:
            self._outputs.rewind()

    @contextmanager
    def resumed(self, start: int, stop: int) -> Iterator[None]:
        """Within, the sublayer answers for windows `start` to `stop` from what is kept, whatever it is given."""
        self._module.forward = lambda *_, **__: self._wrap(self._answer(start, stop))
        if self._norm:
            self._norm.forward = lambda hidden: hidden
        try:
            yield
        finally:
            del self._module.forward
            if self._norm:
                del self._norm.forward

    def _answer(self, start: int, stop: int) -> Tensor:
        device = next(self._linear.parameters()).device
        if self._outputs and self._outputs.windows > start:
            return self._outputs.read(start, stop).to(device)
        answer = self._linear(self.inputs.read(start, stop).to(device))
        if self._outputs:
            self._outputs.append(answer)
        return answer


def _wrapping(result: Any, output: Tensor) -> Any:
    """How `result` is made of `output`: a function, or None where it is not simply that tensor."""
    if isinstance(result, Tensor):
        return (lambda tensor: tensor) if torch.equal(result, output) else None
    if isinstance(result, tuple) and isinstance(result[0], Tensor) and torch.equal(result[0], output):
        rest = (None,) * (len(result) - 1)
        return lambda tensor: (tensor, *rest)
    return None
