"""What a format answers that has words for weights and for nothing beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.core.scheme import Scheme


class Plain:
    """The part of `compress.checkpoint.Format` in which such formats are alike."""

    def metadata(self, entries: Entries, schemes: Collection[Scheme], dtype: str) -> dict[str, str]:
        """None: tensors say all."""
        return {}

    def rotated_inputs(self, config: Mapping[str, Any], layers: Collection[str]) -> dict[str, int]:
        """None: there is no place to say so."""
        return {}

    def input_scale(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
        """None: inputs are not rounded."""
        return None
