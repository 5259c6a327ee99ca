"""Phi-3 and Phi-4: Llama with q, k, v in one matrix and gate, up in another.

Values and up-projections are rows inside the fused matrices, and a source names a whole module, so the inputs
of `o_proj` and `down_proj` have none.
"""

from __future__ import annotations

from dataclasses import replace

from compress.models.anatomy import Site
from compress.models.llama import LLAMA

PHI3 = replace(
    LLAMA,
    family="phi3",
    fixed_heads="queries, keys and values are one matrix",
    sites=(
        Site(roles={"self_attn.qkv_proj": "attn.qkv"}, source="input_layernorm"),
        Site(roles={"self_attn.o_proj": "attn.o"}),
        Site(roles={"mlp.gate_up_proj": "mlp.gate_up"}, source="post_attention_layernorm"),
        Site(roles={"mlp.down_proj": "mlp.down"}),
    ),
)
