"""`from_pretrained` of transformers on our kernels, after `import compress`.

transformers picks a quantizer by the `quant_method` of a folder, and the quantizers of compressed-tensors, GPTQ, AWQ
and torchao stop where the package of that name is not installed. There netsuke steps in: the folder is read by our
codecs and its layers stay packed (`compress.runtime.quantizer`). transformers always goes first, so what loads without
netsuke is loaded by the same code with it, and an import never changes what a model computes. A `quantization_config`
given to `from_pretrained` is a wish about transformers' own quantizer and passes untouched.

    from compress.runtime import plugin

    plugin.takes = "all"      # what we can run stays packed, even where transformers could load it
    plugin.takes = "nothing"  # as if netsuke were not there

transformers has a registry for new methods, none for another reader of a known one, and nothing by which a package
that is merely installed is found. So `get_hf_quantizer`, the one function where all methods pass, gets a function
around it when its module is imported; `import compress` leaves a watcher in `sys.meta_path` for that moment, or finds
the module there already. Checked with transformers 5.17, 5.20 and 5.24.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

takes: Literal["missing", "all", "nothing"] = "missing"
"""Which folders netsuke reads for transformers; may be set at any time."""

CHOOSER = "get_hf_quantizer"
HOME, USER = "transformers.quantizers.auto", "transformers.modeling_utils"
"""The modules that define it and call it."""


def install() -> None:
    """See to it that transformers asks us, whether it has been imported or will be. A second call does nothing."""
    if not any(isinstance(finder, Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watcher())
    if HOME in sys.modules:
        _surround(sys.modules[HOME])


class Watcher(MetaPathFinder):
    """Finds nothing itself; of one module it sees to what happens after its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != HOME:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec and spec.loader:
            loader: Any = spec.loader
            execute: Callable[[ModuleType], None] = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _surround(module)

            loader.exec_module = exec_module
        return spec


def _surround(home: ModuleType) -> None:
    """Put our function around transformers', where it is defined and where it has been imported to."""
    theirs = getattr(home, CHOOSER, None)
    if theirs is None or hasattr(theirs, "__wrapped__"):
        return
    ours = _with_us(theirs)
    for module in (home, sys.modules.get(USER)):
        if getattr(module, CHOOSER, None) is theirs:
            setattr(module, CHOOSER, ours)


def _with_us(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' choice of a quantizer, and ours where it has none or where we are to take all."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def get_hf_quantizer(*arguments: Any, **named: Any) -> Any:
        asked = signature.bind(*arguments, **named).arguments
        config = asked.get("config")
        stored = getattr(config, "quantization_config", None)
        wishes = asked.get("quantization_config") or asked.get("gguf_file")
        if takes == "nothing" or wishes or not isinstance(stored, dict):
            return theirs(*arguments, **named)
        if takes == "missing":
            try:
                return theirs(*arguments, **named)
            except (ImportError, RuntimeError) as error:  # gptq asks for a GPU where its package is missing
                reason = str(error)
                if not _runs(stored):
                    raise
        elif _runs(stored):
            reason = ""
        else:
            return theirs(*arguments, **named)
        config.quantization_config = _as_ours(stored, reason)  # type: ignore[union-attr]
        return theirs(*arguments, **named)

    return get_hf_quantizer


def _runs(stored: dict[str, Any]) -> bool:
    from compress.runtime.quantizer import runs

    return runs(stored)


def _as_ours(stored: dict[str, Any], reason: str) -> dict[str, Any]:
    from compress.runtime.quantizer import METHOD

    return {"quant_method": METHOD, "stored": stored, "reason": reason}
