"""OPT: LayerNorm with biases, learned positions, a two-layer MLP; the small print is in the config.

`do_layer_norm_before=False` (the 350m model) normalises after each half, so the norms feed the residual
stream and not only the layers named here. A scale passes through ReLU, as ReLU(s·x) = s·ReLU(x) for s > 0,
but not through GELU, which Galactica uses under the same `model_type`. Each source says what it
requires of the config. arXiv:2205.01068.
"""

from __future__ import annotations

from compress.models.anatomy import Anatomy, Site

OPT = Anatomy(
    family="opt",
    blocks="model.decoder.layers",
    sites=(
        Site(
            roles={"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"},
            source="self_attn_layer_norm",
            requires=("do_layer_norm_before", True),
            fused=True,
        ),
        Site(roles={"self_attn.out_proj": "attn.o"}, source="self_attn.v_proj"),
        Site(roles={"fc1": "mlp.up"}, source="final_layer_norm", requires=("do_layer_norm_before", True)),
        Site(roles={"fc2": "mlp.down"}, source="fc1", requires=("activation_function", "relu")),
    ),
    ffn_size="ffn_dim",
    fixed_heads="its config cannot say how many channels a head has",
    before=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
    after=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    embedding="model.decoder.embed_tokens",
)
