"""Weight quantization: floats onto integer grids. One file per method.

`METHODS` is the table of contents: the name a recipe uses, and the stage behind it. `ALLOCATORS` decide their bits,
`CORRECTORS` come after them. `CACHES` are not about weights, but about what a model remembers.
"""

from __future__ import annotations

from compress.quantize.allocate import Allocate
from compress.quantize.autoround import AutoRound
from compress.quantize.bias_correction import BiasCorrection
from compress.quantize.gptq import GPTQ
from compress.quantize.hqq import HQQ
from compress.quantize.kv_cache import KVCache
from compress.quantize.low_rank import LowRank
from compress.quantize.rtn import RTN

ALLOCATORS = {Allocate.name: Allocate}
CACHES = {KVCache.name: KVCache}
CORRECTORS = {corrector.name: corrector for corrector in (BiasCorrection, LowRank)}
METHODS = {method.name: method for method in (GPTQ, HQQ, RTN, AutoRound)}
