"""Pruning: weights that are not needed become zeros. One file per method.

`PRUNERS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.prune.sparsify import Sparsify

PRUNERS = {Sparsify.name: Sparsify}
