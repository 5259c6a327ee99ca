"""The second stream: what the original model computes of the same windows, beside what the compressed one does.

A quantized block is fed by quantized blocks. To make up for what those lost, a method must know what a layer would have
been given otherwise. The original block, transforms included, is run once before anything in it is quantized; the
inputs of its sites and its outputs stay in files, window for window those of the compressed stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compress.calibrate.activations import Activations


@dataclass(frozen=True)
class Reference:
    """One block's share of the original stream."""

    inputs: Activations
    outputs: Activations
    """What the block should return: the next block's reference inputs."""
    sites: Mapping[int, Activations]
    """Index of a site → what its layers should be given."""
