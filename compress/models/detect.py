"""An anatomy worked out from tensor names and shapes, for families nobody has described.

Blocks are the numbered path that holds most of the weights. A linear layer is a two-dimensional `.weight`
that every block has. What it does is read from its name and checked against the hidden size: a query reads
it, an output projection writes it. What names cannot tell is left alone: no source is ever given, because
whether a fold preserves the function depends on code, and experts are never touched. Each step is written
down in `conclusions`, so that whoever reads the plan can object.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import ModelError
from compress.models.anatomy import Anatomy, Site

Shapes = Mapping[str, tuple[int, ...]]

ATTENTION = {
    "attn.q": "q_proj q query wq to_q q_lin c_q",
    "attn.k": "k_proj k key wk to_k k_lin c_k",
    "attn.v": "v_proj v value wv to_v v_lin c_v",
    "attn.qkv": "qkv_proj qkv wqkv query_key_value c_attn in_proj att_proj",
    "attn.o": "o_proj o out_proj wo to_out out_lin c_proj dense proj attn_out",
}
MLP = {
    "mlp.gate": "gate_proj gate w1 wi_0",
    "mlp.up": "up_proj up w3 wi_1 wi fc1 fc_in c_fc lin1 linear1 dense_h_to_4h",
    "mlp.gate_up": "gate_up_proj w12",
    "mlp.down": "down_proj down w2 wo fc2 fc_out c_proj proj lin2 linear2 dense_4h_to_h ff_out",
}
SHARING = {"attn.q": "qkv", "attn.k": "qkv", "attn.v": "qkv", "mlp.gate": "gate_up", "mlp.up": "gate_up"}
"""Role → the matrix a serving engine makes of it and of the others that read the same input."""
WRITES_HIDDEN = {"attn.o", "mlp.down"}
NOT_LINEAR = ("norm", "ln_", "embed", "bias", "conv")
HEADS = ("head", "out", "decoder", "unembed")
RUNS_LAST = ("norm", "ln_", "out", "head", "pooler", "cls", "classifier", "score")


@dataclass(frozen=True)
class Layer:
    """A linear layer: its name inside a block and the widths it maps between."""

    name: str
    in_features: int
    out_features: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2].lower()

    @property
    def in_attention(self) -> bool:
        return "att" in self.parent.lower()


def detect(config: Mapping[str, Any], shapes: Shapes) -> Anatomy:
    """The anatomy of an unknown decoder. Raises ModelError where no repeated blocks of matrices are found."""
    blocks = find_blocks(shapes)
    inside = blocks_of(shapes, blocks)
    linear, left_alone = find_linear(inside)
    if not linear:
        raise ModelError(f"{blocks}: every block holds {_sample(inside[0])}, none of which is a matrix for a layer")
    transposed = is_transposed(linear, inside[0])
    layers = [Layer(_module(name), *(shape if transposed else shape[::-1])) for name, shape in linear.items()]
    sites = find_sites(layers)
    outside = {name: shape for name, shape in shapes.items() if not name.startswith(f"{blocks}.")}
    embedding, head = find_vocabulary(config, outside)
    before, after = find_ends(outside, head)
    conclusions = [f"the blocks are {blocks}, {len(inside)} of them"]
    conclusions += [f"{name} is {role}" for site in sites for name, role in site.roles.items()]
    conclusions += [f"{' and '.join(site.layers)} share one input" for site in sites if site.fused]
    conclusions += ["weights are stored [in, out], for biases are as long as rows"] if transposed else []
    conclusions += left_alone
    conclusions.append(f"the embedding is {embedding or 'unknown'}, the head is {head or 'absent'}")
    conclusions.append("no scale can be folded into norms, for names do not tell which norm feeds which layer")
    return Anatomy(
        family=str(config.get("model_type", "unknown")),
        blocks=blocks,
        sites=sites,
        before=before,
        after=after,
        head=head,
        embedding=embedding,
        transposed=transposed,
        conclusions=tuple(conclusions),
    )


def find_blocks(shapes: Shapes) -> str:
    """The path whose numbered children hold the most weights, the outermost such path where several tie."""
    weights: Counter[str] = Counter()
    indices: dict[str, set[str]] = defaultdict(set)
    for name, shape in shapes.items():
        parts = name.split(".")
        for at, part in enumerate(parts[:-2]):
            if at and part.isdigit() and len(shape) >= 2:
                path = ".".join(parts[:at])
                weights[path] += math.prod(shape)
                indices[path].add(part)
    repeated = [path for path in weights if len(indices[path]) > 1]
    if not repeated:
        raise ModelError(
            f"no repeated blocks, `path.<index>.…`, among {len(shapes)} tensors such as {_sample(shapes)}. "
            "Only transformers with a list of blocks can be compressed"
        )
    return max(repeated, key=lambda path: (weights[path], -len(path)))


def blocks_of(shapes: Shapes, blocks: str) -> list[dict[str, tuple[int, ...]]]:
    """For each block in order, the shapes of its tensors under their names inside the block."""
    found: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        if name.startswith(f"{blocks}.") and index.isdigit():
            found[int(index)][rest] = shape
    return [found[index] for index in sorted(found)]


def find_linear(inside: Sequence[Shapes]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The linear weights that all blocks have, and a sentence for each kind of matrix left as it is."""
    matrices = {name: shape for block in inside for name, shape in block.items() if _is_matrix(name, shape)}
    mixture = any(_is_expert(name, shape) for block in inside for name, shape in block.items())
    experts = {name for name in matrices if mixture and (_is_expert(name, matrices[name]) or _is_router(name))}
    uneven = {name for name in matrices if any(name not in block for block in inside)} - experts
    linear = {name: shape for name, shape in matrices.items() if name not in experts | uneven}
    sentences = ["mixture of experts: expert matrices and routers stay as they are"] if mixture else []
    if uneven:
        sentences.append(f"not in every block, and so left as they are: {_sample(sorted(map(_module, uneven)))}")
    return linear, sentences


def is_transposed(linear: Shapes, block: Shapes) -> bool:
    """Whether weights are [in, out]: every bias of a layer that is not square is as long as a row."""
    biases = {name: block.get(name.removesuffix("weight") + "bias") for name in linear}
    lengths = [(linear[name], bias[0]) for name, bias in biases.items() if bias and len(set(linear[name])) > 1]
    return bool(lengths) and all(shape[1] == length for shape, length in lengths)


def find_sites(layers: Sequence[Layer]) -> tuple[Site, ...]:
    """Group layers that share an input, in the order data usually passes them: attention, then MLP."""
    widths = Counter(width for layer in layers for width in (layer.in_features, layer.out_features))
    hidden = widths.most_common(1)[0][0]
    roles = {layer.name: find_role(layer, layers, hidden) for layer in layers}
    groups: dict[object, list[Layer]] = defaultdict(list)
    for layer in sorted(layers, key=lambda layer: _rank(layer, roles[layer.name])):
        matrix = SHARING.get(roles[layer.name])
        alone = matrix is None or "cross" in layer.name or "encoder" in layer.name
        groups[layer.name if alone else (layer.parent, matrix, layer.in_features)].append(layer)
    return tuple(
        Site({layer.name: roles[layer.name] for layer in members}, fused=len(members) > 1)
        for members in groups.values()
    )


def find_role(layer: Layer, layers: Sequence[Layer], hidden: int) -> str:
    """The role a layer's name and widths agree on, `linear` where they do not."""
    siblings = {other.leaf for other in layers if other.parent == layer.parent}
    tables = (ATTENTION, MLP) if layer.in_attention else (MLP, ATTENTION)
    roles = [role for table in tables for role, names in table.items() if layer.leaf in names.split()]
    if not layer.in_attention and layer.leaf == "dense":
        roles = ["mlp.down" if layer.out_features == hidden else "mlp.up"]
    role = roles[0] if roles else "linear"
    if layer.leaf == "w1" and "w3" not in siblings:
        role = "mlp.up"
    width = layer.out_features if role in WRITES_HIDDEN else layer.in_features
    return role if width == hidden else "linear"


def find_vocabulary(config: Mapping[str, Any], outside: Shapes) -> tuple[str, str | None]:
    """The embedding and the head: tables outside the blocks with one row per token of the vocabulary."""
    tables = {_module(name): shape[0] for name, shape in outside.items() if len(shape) == 2}
    size = {**config.get("text_config", {}), **config}.get("vocab_size", max(tables.values(), default=0))
    tables = {name: rows for name, rows in tables.items() if rows == size}
    heads = [name for name in tables if any(word in name for word in ("head", "out", "decoder.weight", "unembed"))]
    embedding = next((name for name in tables if name not in heads), "")
    architecture = next(iter(config.get("architectures") or ()), "ForCausalLM")
    tied = "lm_head" if "ForCausalLM" in architecture or "LMHead" in architecture else None
    return embedding, heads[0] if heads else tied


def find_ends(outside: Shapes, head: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules that run before and after the blocks, told apart by their names."""
    modules = [name for name in dict.fromkeys(map(_module, outside)) if name != head]
    last = [name for name in modules if "embed" not in name and any(word in name for word in RUNS_LAST)]
    return tuple(name for name in modules if name not in last), tuple(last)


def _rank(layer: Layer, role: str) -> int:
    """Where data usually passes a layer: into attention, out of it, into the MLP, out of it."""
    if layer.in_attention or role.startswith("attn."):
        return 2 if role == "attn.o" else 1 if role == "linear" else 0
    return 5 if role == "mlp.down" else 3 if role == "linear" else 4


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not any(word in name.lower() for word in NOT_LINEAR)


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    return any(part.startswith("expert") for part in name.split(".")) or (len(shape) == 3 and "conv" not in name)


def _is_router(name: str) -> bool:
    return "router" in name or _module(name).endswith((".gate", "expert_gate"))


def _sample(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join([*names][:4]) or "nothing"
