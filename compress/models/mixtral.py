"""Mixtral and Qwen 3 MoE: Llama's attention, and in place of the MLP a mixture of experts.

The router, `gate`, has a row for each expert; it and the experts are no linear layers that a stage could quantize, and
stay as they are. Qwen's config may put an ordinary MLP into some blocks, which stays as it is too.
"""

from __future__ import annotations

from dataclasses import replace

from compress.models.llama import LLAMA

QWEN3_MOE = replace(
    LLAMA,
    family="qwen3_moe",
    sites=LLAMA.sites[:2],
    ffn_size="",
    mixture="mlp",
)
MIXTRAL = replace(QWEN3_MOE, family="mixtral", renamed={"block_sparse_moe": "mlp"})
