"""Pruning: weights that are not needed become zeros. One file per method.

`PRUNERS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.prune.depth import Depth
from compress.prune.hidden import Hidden
from compress.prune.merge_heads import MergeHeads
from compress.prune.sparsify import Sparsify

PRUNERS = {Depth.name: Depth, Hidden.name: Hidden, MergeHeads.name: MergeHeads, Sparsify.name: Sparsify}
