"""What is done with a quantized cache, each where it is done best: by a kernel on a GPU, by its reference elsewhere.

append    new keys or values, quantized and written in one launch               kv_append
attend    few queries, split over the tokens                                    kv_decode
          more of them, in tiles; so a chunk of a prompt reads what it has written   kv_prefill
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_kernels.gpu import machine_objection
from quant_kernels.kv_planes import Planes
from quant_kernels.kv_reference import kv_decode_reference

MOST_DECODED = 8
"""Queries that `kv_decode` takes."""


def runs_kernels(x: Tensor) -> bool:
    """Whether keys, values and queries of this type, on this device, are for the kernels."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and machine_objection() is None


def append(x: Tensor, planes: Planes, starts: Tensor, block_table: Tensor | None) -> None:
    """Write x [batch, kv_heads, tokens, D] into planes, at int32 `starts` [batch]; where `runs_kernels(x)`."""
    from quant_kernels import kv_append  # noqa: F401  (registers the operator)

    torch.ops.netsuke.kv_append(x, *planes, starts, block_table)


def attend(q: Tensor, keys: Planes, values: Planes, lengths: Tensor, softmax_scale: float, **others: Any) -> Tensor:
    """q [batch, heads, queries, D] → the same shape. `others`: those of `kv_decode_reference`, by name."""
    if not runs_kernels(q):
        return kv_decode_reference(q, *keys, *values, lengths, softmax_scale, **others)
    if q.shape[2] <= MOST_DECODED:
        from quant_kernels import kv_decode  # noqa: F401  (registers the operator)

        return torch.ops.netsuke.kv_decode(q, *keys, *values, lengths, softmax_scale, **others)
    from quant_kernels import kv_prefill  # noqa: F401  (registers the operator)

    return torch.ops.netsuke.kv_prefill(q, *keys, *values, lengths, softmax_scale, **others)
