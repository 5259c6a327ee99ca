"""The operators of this package as torch knows them: `torch.ops.netsuke.<name>`.

On a GPU an operator launches its Triton kernel; so it does on a CPU where Triton's interpreter is on, which is how the
kernels are tested without a GPU. On a CPU otherwise it is its reference. A fake implementation gives shapes without
data, so that torch.compile and torch.export can go through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

LIBRARY = torch.library.Library("netsuke", "FRAGMENT")
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU. It has no bfloat16 arithmetic and no inline assembly."""
ASSEMBLY: bool = not INTERPRETED and torch.version.hip is None
"""Whether kernels may use inline assembly, which is NVIDIA's."""


def register(
    schema: str, *, launch: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Define the operator `schema` names and return it; all three functions take its arguments."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def launch_there(*args: Any, **kwargs: Any) -> Any:
        """On the device of the tensors: Triton launches on the current one."""
        with torch.cuda.device(next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))):
            return launch(*args, **kwargs)

    LIBRARY.impl(name, launch_there, "CUDA")
    LIBRARY.impl(name, launch if INTERPRETED else reference, "CPU")
    torch.library.register_fake(f"netsuke::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.netsuke, name)
