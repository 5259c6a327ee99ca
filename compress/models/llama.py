"""Llama and the families built like it: pre-norm RMSNorm, separate q k v, gated MLP, no surprises.

Two norms feed the two halves of a block. The input of `o_proj` is a convex mixture of value rows, and that of
`down_proj` is `act(gate) · up`: both are linear in `v_proj` and `up_proj`, channel by channel, so a scale can
be folded there as well. With grouped-query attention one value channel feeds several columns of `o_proj`.

Qwen 3 adds a norm on each query and key head, which changes nothing here; Granite's multipliers and SmolLM3's
layers without rotary embedding do not either.
"""

from __future__ import annotations

from compress.models.anatomy import Anatomy, Site

LLAMA = Anatomy(
    family="llama",
    blocks="model.layers",
    sites=(
        Site(
            roles={"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"},
            source="input_layernorm",
            fused=True,
        ),
        Site(roles={"self_attn.o_proj": "attn.o"}, source="self_attn.v_proj"),
        Site(
            roles={"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up"},
            source="post_attention_layernorm",
            fused=True,
        ),
        Site(roles={"mlp.down_proj": "mlp.down"}, source="mlp.up_proj"),
    ),
    before=("model.embed_tokens",),
    after=("model.norm",),
    embedding="model.embed_tokens",
    ffn_size="intermediate_size",
    fixed_heads="",
)
