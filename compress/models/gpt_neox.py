"""GPT-NeoX, Pythia: attention and MLP read the same residual through two norms, each feeding one layer.

Whether the halves run in parallel or in sequence (`use_parallel_residual`) does not change what feeds what.
Query, key and value rows interleave by head in one matrix, and GELU stands before `dense_4h_to_h`: no source
for either output projection. The head is the module `lm_head`; in the files it is called `embed_out`.
arXiv:2204.06745.
"""

from __future__ import annotations

from compress.models.anatomy import Anatomy, Site

GPT_NEOX = Anatomy(
    family="gpt_neox",
    blocks="gpt_neox.layers",
    sites=(
        Site(roles={"attention.query_key_value": "attn.qkv"}, source="input_layernorm"),
        Site(roles={"attention.dense": "attn.o"}),
        Site(roles={"mlp.dense_h_to_4h": "mlp.up"}, source="post_attention_layernorm"),
        Site(roles={"mlp.dense_4h_to_h": "mlp.down"}),
    ),
    before=("gpt_neox.embed_in",),
    after=("gpt_neox.final_layer_norm",),
    embedding="gpt_neox.embed_in",
    ffn_size="intermediate_size",
    fixed_heads="queries, keys and values are one matrix",
    renamed={"embed_out": "lm_head"},
)
