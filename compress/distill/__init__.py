"""Distillation: a student learns to give the distributions, and the states, of its teacher.

`TRAINERS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.distill.distill import Distill
from compress.distill.qat import QAT

TRAINERS = {Distill.name: Distill, QAT.name: QAT}
