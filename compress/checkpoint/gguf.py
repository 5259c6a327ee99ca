"""GGUF checkpoints: a folder of ours, quantized or not, as one file for llama.cpp.

Codes of ours go into ggml's simple types as they are where the grid permits it (`compress.core.ggml.from_grid`); other
layers are quantized anew from their values, by our own range search, and counted, so that the result says how many
were. Matrices outside the blocks keep their type, unless all are asked for in a plain one. llama.cpp wants rows of
query and key turned from halves into pairs for the llama architecture, one added to Gemma's norms, and vectors in
float32.

`load` gives back tensors under Hugging Face's names, for tests and for transcoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.gguf_config import HEADLESS, complete
from compress.checkpoint.gguf_file import PLAIN, GGUFFile, TensorInfo, save
from compress.checkpoint.gguf_metadata import architecture_of, metadata_of, rope_factors
from compress.checkpoint.weights import QuantizedWeights
from compress.core.ggml import TYPES, Blocks, BlockType, from_grid, type_for
from compress.core.ggml_bytes import from_bytes, to_bytes
from compress.core.ggml_search import blocks
from compress.errors import ModelError, NumericalError, naming
from compress.models.store import Weights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Made = Callable[[str, BlockType], Blocks | None]
"""What there is already of a layer in a type."""


@dataclass(frozen=True)
class Written:
    """What became of the layers."""

    exact: int
    """Layers whose codes are in the file as they were."""
    requantized: int
    kinds: dict[str, int]
    """ggml's type → how many matrices of the blocks have it."""


def kind_named(name: str) -> str:
    """`gguf-q4_k` → `Q4_K`. Raises ValueError where there is no such type."""
    kind = name.removeprefix("gguf-").upper()
    if kind not in TYPES and kind not in PLAIN:
        known = ", ".join(f"gguf-{each.lower()}" for each in (*TYPES, *PLAIN))
        raise ValueError(f"{name}: there is no such type. There are {known}")
    return kind


def export(
    weights: Weights,
    kind: str,
    tokenizer: Any,
    path: Path,
    made: Made = lambda *_: None,
    tell: Callable[[str, float, str], None] = lambda *_: None,
) -> Written:
    """Write the model of a folder as one file, matrices inside the blocks in ggml's type `kind`.

    `made`: what a matrix is in its type, where that has been found already; its rows as transformers has them.
    Raises ModelError where llama.cpp has no such architecture or tokenizer.
    """
    architecture, config = architecture_of(weights.folder.config), complete(weights.folder.config)
    names = {name: stored_name(name, architecture) for name in _names(weights)}
    infos: list[TensorInfo] = []
    plans: list[Callable[[], Tensor]] = []
    counts = {"exact": 0, "requantized": 0}
    kinds: dict[str, int] = {}
    for name, stored in names.items():
        layer, shape = name.removesuffix(".weight"), weights.shape(name)
        found = _type_of(stored, shape, kind)
        heads = _heads_of(config, name) if _turned(name, architecture) else None
        if found is None:
            own = kind if kind in PLAIN else _dtype(weights, name)
            plain = own if own in PLAIN and len(shape) > 1 else "F32"
            infos.append(TensorInfo(stored, shape, plain))
            plans.append(partial(_plain, weights, name, architecture, plain, heads))
            continue
        counts["exact" if held(weights, layer, found) else "requantized"] += 1
        kinds[found.name] = kinds.get(found.name, 0) + 1
        infos.append(TensorInfo(stored, shape, found.name))
        plans.append(partial(_blocks, weights, name, found, made, heads))
    if factors := rope_factors(config):
        infos.append(TensorInfo("rope_freqs.weight", (len(factors),), "F32"))
        plans.append(partial(torch.tensor, factors))

    def tensors() -> Iterator[Tensor]:
        for index, (info, make) in enumerate(zip(infos, plans, strict=True)):
            tell("gguf", index / len(infos), info.name)
            yield make()

    save(path, metadata_of(config, tokenizer, kind, path.stem), infos, tensors())
    return Written(counts["exact"], counts["requantized"], kinds)


def load(path: Path) -> dict[str, Tensor]:
    """Every tensor of such a file in float32 under Hugging Face's name, heads and norms as transformers has them."""
    file = GGUFFile(path)
    architecture = file.metadata.get("general.architecture")
    found = {}
    for stored in file.infos:
        name = _name_of(stored, str(architecture))
        if name is None:
            continue
        kind = file.block_type(stored)
        raw = file.read(stored)
        value = from_bytes(raw, kind).dequantize() if kind else raw.float()
        if _turned(name, str(architecture)):
            heads = _heads(file.metadata, name)
            if not isinstance(heads, int) or heads < 1 or len(value) % (2 * heads):
                raise ModelError(f"{path}: {stored} has {len(value)} rows, for {heads!r} heads")
            value = _halves(value, heads)
        if _shifted(name, str(architecture)):
            value = value - 1
        found[name] = value
    return found


def stored_name(name: str, architecture: str) -> str:
    """What llama.cpp calls a tensor. Raises ModelError where it has no place for it."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    inside = parts[:2] == ["model", "layers"]
    table = INSIDE | _norms(architecture) if inside else OUTSIDE
    key = ".".join(parts[3:]) if inside else module
    if key not in table or (key == "lm_head" and architecture in HEADLESS.split()):
        raise ModelError(f"{name}: llama.cpp's {architecture} has no such tensor, so this model cannot be a GGUF file")
    return f"blk.{parts[2]}.{table[key]}.{leaf}" if inside else f"{table[key]}.{leaf}"


def _name_of(stored: str, architecture: str) -> str | None:
    """Hugging Face's name of a tensor; None for what it has none for."""
    module, _, leaf = stored.rpartition(".")
    if not module.startswith("blk."):
        return next((f"{name}.{leaf}" for name, own in OUTSIDE.items() if own == module), None)
    _, block, part, *_ = *module.split(".", 2), "", ""
    table = INSIDE | _norms(architecture)
    found = next((name for name, own in table.items() if own == part), None)
    return f"model.layers.{block}.{found}.{leaf}" if found and block.isascii() and block.isdigit() else None


def _norms(architecture: str) -> dict[str, str]:
    return GEMMA_NORMS if architecture in ("gemma2", "gemma3") else NORMS


def _names(weights: Weights) -> list[str]:
    """Every tensor of the model, a quantized layer's by the name its weight would have."""
    quantized = weights.schemes if isinstance(weights, QuantizedWeights) else {}
    names: dict[str, None] = {}
    for name in weights.tensors:
        layer, _, leaf = name.rpartition(".")
        names[f"{layer}.weight" if layer in quantized and leaf != "bias" else name] = None
    return [name for name in names if name != HEAD or not _is_embedding(weights)]


def _is_embedding(weights: Weights) -> bool:
    """Whether the head, which is stored, is the embedding: what llama.cpp takes where a file has none."""
    tied = complete(weights.folder.config)["tie_word_embeddings"]
    return tied and torch.equal(weights.read(HEAD).float(), weights.read(EMBEDDING).float())


def _dtype(weights: Weights, name: str) -> str:
    """What a tensor is stored as; a quantized layer's weight, which is not stored, has values of about F16's precision:
    codes of few bits times a scale."""
    header = weights.tensors.get(name)
    return header.dtype if header else "F16"


def _plain(weights: Weights, name: str, architecture: str, kind: str, heads: int | None) -> Tensor:
    """A tensor as llama.cpp wants its rows and its norms. `heads`: of rows that are turned."""
    value = weights.read(name).float()
    value = _pairs(value, heads) if heads else value
    value = value + 1 if _shifted(name, architecture) else value
    stored = value.to(PLAIN[kind][1])
    if lost := int((value.isfinite() & ~stored.isfinite()).sum()):
        largest = value.abs().max().item()
        raise NumericalError(f"{name}: {kind} does not hold {lost} of its numbers, up to {largest:g}. Use f32 or bf16")
    return stored


def all_held(weights: Weights, kind: str) -> bool:
    """Whether every matrix of the blocks has its codes in this type already, so that none is quantized anew."""
    architecture = architecture_of(weights.folder.config)
    types = {name: _type_of(stored_name(name, architecture), weights.shape(name), kind) for name in _names(weights)}
    return all(held(weights, name.removesuffix(".weight"), found) for name, found in types.items() if found)


def _type_of(stored: str, shape: tuple[int, ...], kind: str) -> BlockType | None:
    """The type of a tensor that is called so in the file; None: a plain one."""
    inside = stored.startswith("blk.") and len(shape) == 2
    return type_for(kind, shape[-1]) if inside else None


def held(weights: Weights, layer: str, kind: BlockType) -> Blocks | None:
    """A quantized layer's codes as they are, where this type holds them."""
    if not isinstance(weights, QuantizedWeights) or layer not in weights.schemes:
        return None
    codes = from_grid(weights.quantized(layer))
    return codes if codes and codes.kind == kind else None


def _blocks(weights: Weights, name: str, kind: BlockType, made: Made, heads: int | None) -> Tensor:
    layer = name.removesuffix(".weight")
    with naming(name):
        found = held(weights, layer, kind) or made(layer, kind) or blocks(weights.read(name).float(), kind)
    return to_bytes(found.by_rows(lambda rows: _pairs(rows, heads)) if heads else found)


def _turned(name: str, architecture: str) -> bool:
    """Whether llama.cpp has a tensor's rotary channels in pairs where transformers has them in halves."""
    return architecture == "llama" and name.rpartition(".")[0].endswith((".q_proj", ".k_proj"))


def _shifted(name: str, architecture: str) -> bool:
    """Whether llama.cpp stores one more than transformers: the weights of Gemma's norms."""
    return architecture.startswith("gemma") and "norm" in name.rpartition(".")[0].rpartition(".")[2]


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads [2 halves of d/2] as [d/2 pairs]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _heads_of(config: Mapping[str, Any], name: str) -> int:
    return config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]


def _heads(metadata: Mapping[str, Any], name: str) -> Any:
    leaf = "head_count" if ".q_proj" in name else "head_count_kv"
    return metadata.get(f"{metadata['general.architecture']}.attention.{leaf}")
