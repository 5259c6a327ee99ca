"""llama.cpp's own quantizer, through cyllama, and which llama.cpp that is."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import cyllama
from cyllama.llama import llama_cpp

FTYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}
"""llama.cpp's numbers of what a file may consist of."""
F32 = 0
"""ggml's number of the type."""
BUILD = json.loads((Path(cyllama.__file__).parent / "build_config.json").read_text())["versions"]["llama_cpp_version"]
VERSION = f"llama.cpp {BUILD} (cyllama {importlib.metadata.version('cyllama')})"


def quantize(source: Path, target: Path, kind: str) -> None:
    """A file in another type; what is outside the blocks in float32. To F32, a file as llama.cpp decodes it."""
    llama_cpp.disable_logging()
    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype, options.allow_requantize, options.pure, options.nthread = FTYPES[kind], True, True, 1
    options.token_embedding_type = options.output_tensor_type = F32
    llama_cpp.model_quantize(str(source), str(target), options)
