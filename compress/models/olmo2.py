"""OLMo 2 and 3: Llama's layers, normalised after attention and MLP instead of before.

The projections read the residual stream itself, which other blocks read too, so only the folds inside
attention and MLP remain. arXiv:2501.00656.
"""

from __future__ import annotations

from dataclasses import replace

from compress.models.llama import LLAMA

_attention_in, _attention_out, _mlp_in, _mlp_out = LLAMA.sites

OLMO2 = replace(
    LLAMA,
    family="olmo2",
    sites=(replace(_attention_in, source=None), _attention_out, replace(_mlp_in, source=None), _mlp_out),
    fixed_heads="a norm takes all heads together",
)
