"""Weight quantization: floats onto integer grids. One file per method.

`METHODS` is the table of contents: the name a recipe uses, and the stage behind it.
"""

from __future__ import annotations

from compress.quantize.gptq import GPTQ
from compress.quantize.rtn import RTN

METHODS = {method.name: method for method in (GPTQ, RTN)}
