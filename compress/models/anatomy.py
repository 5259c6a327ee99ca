"""What an architecture is, as data: where its blocks are, what each linear layer does, which share an input.

An anatomy is written once per family and holds names only. Everything that walks, plans, quantizes or folds
reads these names; nothing else in the project knows one architecture from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """A place in a block where one input feeds one or more linear layers.

    Layers of one site see the same activations, so they share one set of calibration statistics.
    """

    roles: Mapping[str, str]
    """Layer name inside the block → role, for example `{"self_attn.q_proj": "attn.q"}`."""
    source: str | None = None
    """The norm or linear inside the block whose output, scaled per channel, is this input: where a
    function-preserving scale can be folded. None: nothing linear stands before it."""
    requires: tuple[str, object] | None = None
    """The config key and value under which the fold into `source` holds; None: it always does."""
    fused: bool = False
    """A serving engine runs these layers as one matrix, so they must be quantized alike."""

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.roles)


@dataclass(frozen=True)
class Anatomy:
    """One family. All block-level names are relative to a block, `blocks.<index>.`; the rest are module paths."""

    family: str
    blocks: str
    """The module list that holds the transformer blocks, `model.layers`."""
    sites: tuple[Site, ...]
    """Sites of one block in the order the data passes them (the true-sequential order)."""
    before: tuple[str, ...] = ()
    """Modules that run before the first block: embeddings, and norms or projections next to them."""
    after: tuple[str, ...] = ()
    """Modules that run after the last block, the head excluded."""
    head: str | None = "lm_head"
    """The output projection over the vocabulary, None for encoders."""
    embedding: str = ""
    """The token embedding, which `head` may be tied to."""
    norm_offset: float = 0.0
    """A norm multiplies by `norm_offset + weight` (1 in Gemma)."""
    transposed: bool = False
    """Linear weights are stored [in, out] (GPT-2's Conv1D)."""
    ffn_size: str = ""
    """The config key of how many channels an MLP has inside; empty: not known, so they cannot be made fewer."""
    fixed_heads: str = "nobody has described its heads"
    """Why heads cannot be made fewer. Empty: config.json has `head_dim`, and a head is a run of rows of q, k and v."""
    mixture: str = ""
    """The module inside a block that holds a mixture: `gate`, the router, with a row for each expert, and `experts`.
    Empty: there is none, or it is another kind."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Modules whose tensors are stored under another name: stored name → module path (GPT-NeoX's head), or the same
    inside a block."""
    conclusions: tuple[str, ...] = field(default=(), compare=False)
    """What the structural detector concluded, in sentences; empty for a known family."""

    @property
    def roles(self) -> dict[str, str]:
        """Layer name inside a block → role, over all sites."""
        return {name: role for site in self.sites for name, role in site.roles.items()}
