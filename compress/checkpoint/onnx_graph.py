"""A decoder as an ONNX graph: Llama, Mistral, Qwen 2 and Qwen 3, with a cache of keys and values.

    input_ids, position_ids [batch, sequence]   attention_mask [batch, past + sequence]
    past_key_values.{i}.key, .value [batch, heads, past, channels] → present.{i}.key, .value
    logits [batch, sequence, vocabulary]

A prompt has a past of no tokens. Sequences of a batch may be padded, on either side: the mask says where, and positions
are given. All is computed in float32. A quantized layer is a MatMulNBits, another layer a product with its weight, kept
in its type and cast where it is used. Rotary frequencies are those of transformers' own module; where they depend on
the length of the text the model is refused, and so is one with a parameter that has no place here.

Operators are ONNX's of version 23 and onnxruntime's own. onnxruntime has had them since 1.23, for 2 bits since 1.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.onnx_blocks import Operands
from compress.checkpoint.onnx_file import TYPES, GraphWriter
from compress.errors import ModelError
from compress.models.store import LazyModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary frequencies that are the same for every text."""
OPERANDS = ("codes", "scales", "zero_points")
FLOAT, BOOL, INTEGER = TYPES[torch.float32], TYPES[torch.bool], torch.int64
END = torch.iinfo(torch.int64).max
NEVER = torch.finfo(torch.float32).min
"""A score that leaves nothing after the softmax. Where a row has no other, as that of padding, it is still a number."""
ONNXRUNTIME, INT8 = "com.microsoft", 4


def unsupported(model: LazyModel) -> list[str]:
    """Why this model is not such a decoder, a sentence each."""
    config, where = model.config, model.weights.folder.path / "config.json"
    name = type(model.module).__name__
    if name not in ARCHITECTURES:
        return [f"{where}: {name} cannot be written as a graph; {', '.join(ARCHITECTURES)} can"]
    rotary: Any = model.module.get_submodule("model.rotary_emb")
    problems = []
    if rotary.rope_type not in ROPES:
        known = ", ".join(ROPES)
        problems.append(f"{where}: rope_type {rotary.rope_type!r} depends on the length of the text; {known} do not")
    elif 2 * len(rotary.inv_freq) != _head_dim(config):
        problems.append(
            f"{where}: rotates {2 * len(rotary.inv_freq)} of {_head_dim(config)} channels of a head, not all"
        )
    if config.hidden_act != "silu":
        problems.append(f"{where}: hidden_act {config.hidden_act!r} has no place in the graph, only 'silu' has")
    return problems


class Decoder:
    """Writes the graph of a model for which nothing is `unsupported`, with one tensor in memory at a time."""

    def __init__(
        self, model: LazyModel, graph: GraphWriter, operands: Mapping[str, Callable[[], Operands]], int8_inputs: bool
    ) -> None:
        """`operands`: of each quantized layer, worked out when they are asked for. `int8_inputs`: whether a runtime may
        round what a quantized layer is given to int8, block by block."""
        self.model, self.graph, self.operands = model, graph, operands
        self.settings: dict[str, Any] = {"accuracy_level": INT8} if int8_inputs else {}
        self.config = model.config
        self.heads, self.cached_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.parameters = {name for name, _ in model.module.named_parameters()}
        self.left = set(self.parameters)

    def write(self) -> None:
        """Raises ModelError where a parameter of the model is not in the graph."""
        ids = self.graph.input("input_ids", INTEGER, ["batch", "sequence"])
        attended = self.graph.input("attention_mask", INTEGER, ["batch", "past + sequence"])
        positions = self.graph.input("position_ids", INTEGER, ["batch", "sequence"])
        self.graph.output("logits", torch.float32, ["batch", "sequence", self.config.vocab_size])
        self.cos, self.sin = self._rotation(positions)
        windows = [self._window(block) for block in range(len(self.model.blocks))]
        masks = {window: self._mask(ids, attended, window) for window in dict.fromkeys(windows)}
        hidden = self._embedding("model.embed_tokens", ids)
        for block, window in enumerate(windows):
            hidden = self._block(block, hidden, masks[window])
        self.graph.node("Identity", self._linear("lm_head", self._norm("model.norm", hidden)), name="logits")
        if self.left:
            raise ModelError(f"{min(self.left)}: has no place in the graph, so the model cannot be written as one")

    def _block(self, index: int, hidden: str, mask: str) -> str:
        name = f"model.layers.{index}"
        mixed = self._attention(index, self._norm(f"{name}.input_layernorm", hidden), mask)
        hidden = self.graph.node("Add", hidden, mixed, name=f"{name}.middle")
        inner = self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", hidden))
        return self.graph.node("Add", hidden, inner, name=name)

    def _attention(self, index: int, hidden: str, mask: str) -> str:
        name = f"model.layers.{index}.self_attn"
        query = self._rotated(f"{name}.q", hidden, self.heads)
        key = self._rotated(f"{name}.k", hidden, self.cached_heads)
        value = self._linear(f"{name}.v_proj", hidden)
        past, present = [], []
        for which in ("key", "value"):
            before, after = (
                ["batch", self.cached_heads, length, _head_dim(self.config)] for length in ("past", "past + sequence")
            )
            past.append(self.graph.input(f"past_key_values.{index}.{which}", torch.float32, before))
            present.append(self.graph.output(f"present.{index}.{which}", torch.float32, after))
        mixed = self.graph.node(
            "Attention", query, key, value, mask, *past,
            name=name, outputs=(name, *present), q_num_heads=self.heads, kv_num_heads=self.cached_heads,
        )  # fmt: skip
        return self._linear(f"{name}.o_proj", mixed)

    def _rotated(self, name: str, hidden: str, heads: int) -> str:
        """Queries or keys, normed head by head where the model does so, and rotated by their positions."""
        states = self._linear(f"{name}_proj", hidden)
        if f"{name}_norm.weight" in self.parameters:
            split = self.graph.node("Reshape", states, self._numbers(0, 0, heads, -1))
            states = self.graph.node("Reshape", self._norm(f"{name}_norm", split), self._numbers(0, 0, -1))
        return self.graph.node("RotaryEmbedding", states, self.cos, self.sin, name=f"{name}_rotated", num_heads=heads)

    def _mlp(self, name: str, hidden: str) -> str:
        gate, up = self._linear(f"{name}.gate_proj", hidden), self._linear(f"{name}.up_proj", hidden)
        opened = self.graph.node("Mul", gate, self.graph.node("Sigmoid", gate))
        return self._linear(f"{name}.down_proj", self.graph.node("Mul", opened, up))

    def _norm(self, name: str, hidden: str) -> str:
        weight = self.graph.weight(f"{name}.weight", self._read(f"{name}.weight").float())
        epsilon = self.config.rms_norm_eps
        return self.graph.node("RMSNormalization", hidden, weight, name=name, axis=-1, epsilon=epsilon)

    def _linear(self, name: str, hidden: str) -> str:
        biased = f"{name}.bias" in self.parameters
        product = f"{name}.product" if biased else name
        if name in self.operands:
            self._quantized(name, hidden, product)
        else:
            weight = self.graph.node("Cast", self._stored(f"{name}.weight"), to=FLOAT)
            self.graph.node("FusedMatMul", hidden, weight, name=product, domain=ONNXRUNTIME, transB=1)
        if not biased:
            return product
        bias = self.graph.weight(f"{name}.bias", self._read(f"{name}.bias").float())
        return self.graph.node("Add", product, bias, name=name)

    def _quantized(self, layer: str, hidden: str, product: str) -> None:
        held = self.operands[layer]()
        self.left.discard(f"{layer}.weight")
        parts = {f"{layer}.{leaf}": getattr(held, leaf) for leaf in OPERANDS}
        inputs = [self.graph.weight(name, part) for name, part in parts.items() if part is not None]
        sizes: dict[str, Any] = {"K": held.columns, "N": len(held.codes), "bits": held.bits, "block_size": held.block}
        self.graph.node("MatMulNBits", hidden, *inputs, name=product, domain=ONNXRUNTIME, **sizes, **self.settings)

    def _embedding(self, name: str, ids: str) -> str:
        rows = self.graph.node("Gather", self._stored(f"{name}.weight"), ids)
        return self.graph.node("Cast", rows, name=name, to=FLOAT)

    def _stored(self, name: str) -> str:
        """A weight in its own type; of two that are tied, the first."""
        self.left.discard(name)
        source = self.model.tied.get(name, name)
        return source if source in self.graph else self.graph.weight(source, self._read(source))

    def _read(self, name: str) -> Tensor:
        self.left.discard(name)
        return self.model.weights.read(name)

    def _rotation(self, positions: str) -> tuple[str, str]:
        """Cosines and sines of all positions, [batch, sequence, half a head]."""
        rotary: Any = self.model.module.get_submodule("model.rotary_emb")
        frequencies = self.graph.constant("rotary.frequencies", rotary.inv_freq.float())
        scaling = self.graph.constant("rotary.scaling", torch.tensor(float(rotary.attention_scaling)))
        column = self.graph.node("Unsqueeze", self.graph.node("Cast", positions, to=FLOAT), self._numbers(-1))
        angles = self.graph.node("Mul", column, frequencies)
        cos, sin = (self.graph.node("Mul", self.graph.node(which, angles), scaling) for which in ("Cos", "Sin"))
        return cos, sin

    def _mask(self, ids: str, attended: str, window: int | None) -> str:
        """What is added to scores, [batch, 1, sequence, past + sequence]: 0 where a token attends to itself or to one
        before it that is no padding and, padding not counted, within the window."""
        node, scalar, numbers = self.graph.node, self._scalar, self._numbers
        length, total = (node("Squeeze", node("Shape", each, start=1, end=2)) for each in (ids, attended))
        past = node("Sub", total, length)
        real = node("Cast", attended, to=BOOL)
        keys = node("Range", scalar(0), total, scalar(1))
        queries = node("Unsqueeze", node("Range", past, total, scalar(1)), numbers(1))
        seen = node("And", node("LessOrEqual", keys, queries), node("Unsqueeze", real, numbers(1, 2)))
        if window is not None:
            places = node("CumSum", attended, scalar(1))
            own = node("Slice", places, node("Unsqueeze", past, numbers(0)), numbers(END), numbers(1))
            reach = node("Sub", node("Unsqueeze", own, numbers(1, 3)), scalar(window))
            seen = node("And", seen, node("Greater", node("Unsqueeze", places, numbers(1, 2)), reach))
        return node("Where", seen, scalar(0.0), scalar(NEVER))

    def _window(self, block: int) -> int | None:
        """The number of tokens a block attends to; None: all. A Llama has no windows, whatever its config says."""
        family = self.config.model_type
        slides = family == "mistral" or (family != "llama" and self.config.layer_types[block] == "sliding_attention")
        return self.config.sliding_window if slides else None

    def _numbers(self, *values: int) -> str:
        return self.graph.constant(f"numbers.{'.'.join(map(str, values))}", torch.tensor(values))

    def _scalar(self, value: float) -> str:
        return self.graph.constant(f"number.{value}", torch.tensor(value))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
