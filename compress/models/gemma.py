"""Gemma: Llama's layers with norms that multiply by one plus their weight, and embeddings scaled on reading.

Gemma 2 and 3 wrap attention and MLP in a norm on either side. The MLP is fed by `pre_feedforward_layernorm`;
`post_attention_layernorm`, the MLP's norm in Gemma 1, is there the norm after attention and feeds no layer.
"""

from __future__ import annotations

from dataclasses import replace

from compress.models.llama import LLAMA

_attention_in, _attention_out, _mlp_in, _mlp_out = LLAMA.sites

GEMMA = replace(LLAMA, family="gemma", norm_offset=1.0)

GEMMA2 = replace(
    GEMMA,
    family="gemma2",
    sites=(_attention_in, _attention_out, replace(_mlp_in, source="pre_feedforward_layernorm"), _mlp_out),
)
