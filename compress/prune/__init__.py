"""Pruning: weights that are not needed become zeros. One file per method.

`PRUNERS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.prune.depth import Depth
from compress.prune.experts import Experts
from compress.prune.hidden import Hidden
from compress.prune.merge_heads import MergeHeads
from compress.prune.shape import Shape
from compress.prune.sparsify import Sparsify
from compress.prune.width import Width

PRUNERS = {stage.name: stage for stage in (Depth, Experts, Hidden, MergeHeads, Shape, Sparsify, Width)}
