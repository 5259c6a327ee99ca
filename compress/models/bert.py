"""BERT: an encoder that normalises after each half, so that norms feed the residual stream too.

The one exact fold is from values into the attention's output projection. Task heads differ by model class;
those a checkpoint does not have are dropped when it is opened. arXiv:1810.04805.
"""

from __future__ import annotations

from compress.models.anatomy import Anatomy, Site

BERT = Anatomy(
    family="bert",
    blocks="bert.encoder.layer",
    sites=(
        Site(
            roles={
                "attention.self.query": "attn.q",
                "attention.self.key": "attn.k",
                "attention.self.value": "attn.v",
            },
            fused=True,
        ),
        Site(roles={"attention.output.dense": "attn.o"}, source="attention.self.value"),
        Site(roles={"intermediate.dense": "mlp.up"}),
        Site(roles={"output.dense": "mlp.down"}),
    ),
    before=("bert.embeddings",),
    after=("bert.pooler", "cls", "classifier", "qa_outputs"),
    head=None,
    embedding="bert.embeddings.word_embeddings",
    ffn_size="intermediate_size",
    fixed_heads="its config cannot say how many channels a head has",
)
