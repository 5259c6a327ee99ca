"""netsuke: carve large transformer models small, and keep every detail.

    import compress
    report = compress.run("w4a16-gptq", model="path/or/id", output="out", calibration="data.jsonl")
    model, tokenizer = compress.load("out")

Names are imported when they are first used, so that `import compress` costs nothing. What it does is to stand by for
transformers: `from_pretrained` then loads packed folders whose own package is missing (`compress.runtime.plugin`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.runtime import plugin

__version__ = "0.1.0"

_HOME = {
    "AWQ": "compress.transform.awq",
    "Allocate": "compress.quantize.allocate",
    "AutoRound": "compress.quantize.autoround",
    "BiasCorrection": "compress.quantize.bias_correction",
    "DataError": "compress.errors",
    "GPTQ": "compress.quantize.gptq",
    "Grid": "compress.core.scheme",
    "HQQ": "compress.quantize.hqq",
    "KVCache": "compress.quantize.kv_cache",
    "LowRank": "compress.quantize.low_rank",
    "ModelError": "compress.errors",
    "NetsukeError": "compress.errors",
    "OutputError": "compress.errors",
    "Pipeline": "compress.pipeline",
    "QuantizedTensor": "compress.core.qtensor",
    "RTN": "compress.quantize.rtn",
    "Recipe": "compress.recipe",
    "RecipeError": "compress.errors",
    "RequestError": "compress.errors",
    "Rotate": "compress.transform.rotate",
    "RunError": "compress.errors",
    "SmoothQuant": "compress.transform.smoothquant",
    "generate": "compress.runtime.generate",
    "load": "compress.runtime.load",
    "prepare": "compress.pipeline",
    "quantized_cache": "compress.runtime.attention",
    "run": "compress.pipeline",
}

if TYPE_CHECKING:
    from compress.core.qtensor import QuantizedTensor as QuantizedTensor
    from compress.core.scheme import Grid as Grid
    from compress.errors import DataError as DataError
    from compress.errors import ModelError as ModelError
    from compress.errors import NetsukeError as NetsukeError
    from compress.errors import OutputError as OutputError
    from compress.errors import RecipeError as RecipeError
    from compress.errors import RequestError as RequestError
    from compress.errors import RunError as RunError
    from compress.pipeline import Pipeline as Pipeline
    from compress.pipeline import prepare as prepare
    from compress.pipeline import run as run
    from compress.quantize.allocate import Allocate as Allocate
    from compress.quantize.autoround import AutoRound as AutoRound
    from compress.quantize.bias_correction import BiasCorrection as BiasCorrection
    from compress.quantize.gptq import GPTQ as GPTQ
    from compress.quantize.hqq import HQQ as HQQ
    from compress.quantize.kv_cache import KVCache as KVCache
    from compress.quantize.low_rank import LowRank as LowRank
    from compress.quantize.rtn import RTN as RTN
    from compress.recipe import Recipe as Recipe
    from compress.runtime.attention import quantized_cache as quantized_cache
    from compress.runtime.generate import generate as generate
    from compress.runtime.load import load as load
    from compress.transform.awq import AWQ as AWQ
    from compress.transform.rotate import Rotate as Rotate
    from compress.transform.smoothquant import SmoothQuant as SmoothQuant


plugin.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
