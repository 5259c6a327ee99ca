"""Running data through the model: text to tokens, activations, statistics, and the only loop over blocks.

The sizes here decide how much memory a run takes; the plan predicts it from the same numbers.
"""

from __future__ import annotations

BATCH_TOKENS = 2048
"""Tokens that go through a block at once."""
FLOAT64_BELOW = 8192
"""Inputs from which on statistics are kept in float32, where memory counts more than the last digits."""
