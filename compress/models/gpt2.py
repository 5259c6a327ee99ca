"""GPT-2: pre-norm with biases, learned positions, q, k, v in one matrix, and weights stored [in, out]."""

from __future__ import annotations

from compress.models.anatomy import Anatomy, Site

GPT2 = Anatomy(
    family="gpt2",
    blocks="transformer.h",
    sites=(
        Site(roles={"attn.c_attn": "attn.qkv"}, source="ln_1"),
        Site(roles={"attn.c_proj": "attn.o"}),
        Site(roles={"mlp.c_fc": "mlp.up"}, source="ln_2"),
        Site(roles={"mlp.c_proj": "mlp.down"}),
    ),
    before=("transformer.wte", "transformer.wpe"),
    after=("transformer.ln_f",),
    embedding="transformer.wte",
    transposed=True,
    ffn_size="n_inner",
    fixed_heads="queries, keys and values are one matrix",
)
