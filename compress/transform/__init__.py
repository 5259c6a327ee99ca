"""Transforms: rewrites that keep the model's function and make it easier to quantize. One file each.

`TRANSFORMS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.transform.awq import AWQ
from compress.transform.rotate import Rotate
from compress.transform.smoothquant import SmoothQuant

TRANSFORMS = {transform.name: transform for transform in (AWQ, Rotate, SmoothQuant)}
