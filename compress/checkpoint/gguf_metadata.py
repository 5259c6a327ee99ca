"""What a GGUF file says of a model: architecture, sizes, and the tokenizer, from config.json and tokenizer.json.

Keys and numbers are llama.cpp's (https://github.com/ggml-org/llama.cpp, `gguf-py/gguf/constants.py`). There are two
kinds of tokenizers: byte-level BPE (`gpt2`), with its merges and the name of the rule by which text is cut beforehand,
and SentencePiece's BPE (`llama`), where a token's score says which of two neighbours are joined first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from compress.checkpoint.gguf_config import ARCHITECTURES, complete, otherwise
from compress.checkpoint.gguf_limits import rope_of, unlike
from compress.errors import ModelError

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "BF16": 32,
}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""
PRE_TOKENIZERS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|": "llama-bpe",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|": "qwen2",
}
"""How the rule by which text is cut begins → llama.cpp's name of it."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of what computes the same. Raises ModelError where there is none that is known here."""
    found = ARCHITECTURES.get(config.get("model_type", ""))
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"model_type {config.get('model_type')!r} cannot be written as GGUF; {known} can")
    full = complete(config)
    if told := [*otherwise(full, found), *unlike(full, found)]:
        raise ModelError(
            f"llama.cpp's {found} is not this model, so it cannot be a GGUF file. It has {'; '.join(told)}. "
            "Keep the folder, or convert to onnx, which holds the operations themselves"
        )
    return found


def metadata_of(config: Mapping[str, Any], tokenizer: Any, kind: str, name: str) -> dict[str, Any]:
    """Every entry of the file's head. Raises ModelError for a tokenizer that llama.cpp has no kind for."""
    own, config = architecture_of(config), complete(config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_of(config)
    entries: dict[str, Any] = {
        "general.architecture": own,
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{own}.context_length": config["max_position_embeddings"],
        f"{own}.embedding_length": config["hidden_size"],
        f"{own}.block_count": config["num_hidden_layers"],
        f"{own}.feed_forward_length": config["intermediate_size"],
        f"{own}.attention.head_count": heads,
        f"{own}.attention.head_count_kv": config["num_key_value_heads"],
        f"{own}.attention.key_length": head_dim,
        f"{own}.attention.value_length": head_dim,
        f"{own}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{own}.rope.dimension_count": head_dim,
        f"{own}.rope.freq_base": float(rope["rope_theta"]),
        f"{own}.vocab_size": config["vocab_size"],
    }
    if rope.get("rope_type") == "linear":
        entries |= {f"{own}.rope.scaling.type": "linear", f"{own}.rope.scaling.factor": float(rope["factor"])}
    if own in ("gemma2", "gemma3") and config.get("sliding_window"):
        entries[f"{own}.attention.sliding_window"] = config["sliding_window"]
    if own == "gemma2":
        entries[f"{own}.attn_logit_softcapping"] = float(config["attn_logit_softcapping"])
        entries[f"{own}.final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return entries | _tokenizer(config, tokenizer)


def rope_factors(config: Mapping[str, Any]) -> list[float]:
    """What each rotary frequency of Llama 3.1's scaling is divided by; nothing for other models."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return []
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(rope["rope_theta"])
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (pair / head_dim)
        smooth = (context / wavelength - low) / (high - low)
        factors.append(1 / ((1 - min(1.0, max(0.0, smooth))) / factor + min(1.0, max(0.0, smooth))))
    return factors


def _tokenizer(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json, from which a GGUF file's would be made")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"the tokenizer is {model.get('type')}; only BPE can be written as GGUF")
    added = {each["id"]: each for each in described["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {
        index: each["content"] for index, each in added.items()
    }
    size = config["vocab_size"]  # words that the tokenizer has beyond it have no embedding
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(size)]
    words = {*tokens}
    unknown = model.get("unk_token")
    kinds = [
        _kind(index, text, added, unknown, bool(model.get("byte_fallback"))) if index in texts else UNUSED
        for index, text in enumerate(tokens)
    ]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    merges = [pair for pair in merges if pair.replace(" ", "", 1) in words]
    entries: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if model.get("byte_fallback"):
        ranks = {pair.replace(" ", ""): rank for rank, pair in reversed([*enumerate(merges)])}
        entries["tokenizer.ggml.model"] = "llama"
        entries["tokenizer.ggml.scores"] = [
            float(-ranks.get(text, len(merges) + index)) for index, text in enumerate(tokens)
        ]
        entries["tokenizer.ggml.add_space_prefix"] = "▁" in json.dumps(described.get("normalizer"), ensure_ascii=False)
    else:
        entries |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre(described),
            "tokenizer.ggml.merges": merges,
        }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None and index < size:
            entries[f"tokenizer.ggml.{key}_token_id"] = index
    first = entries.get("tokenizer.ggml.bos_token_id")
    entries["tokenizer.ggml.add_bos_token"] = first is not None and tokenizer("a").input_ids[:1] == [first]
    if template := getattr(tokenizer, "chat_template", None):
        entries["tokenizer.chat_template"] = template
    return entries


def _kind(index: int, text: str, added: Mapping[int, Any], unknown: str | None, has_bytes: bool) -> int:
    if text == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    return BYTE if has_bytes and len(text) == 6 and text.startswith("<0x") else NORMAL


def _pre(described: Mapping[str, Any]) -> str:
    """The name of the rule by which text is cut into words. Raises ModelError for one that is not known here."""
    told = json.dumps(described.get("pre_tokenizer"), ensure_ascii=False)
    steps = (described.get("pre_tokenizer") or {}).get("pretokenizers") or [described.get("pre_tokenizer") or {}]
    for step in steps:
        pattern = (step.get("pattern") or {}).get("Regex", "")
        for beginning, name in PRE_TOKENIZERS.items():
            if pattern.startswith(beginning):
                return name
    if any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2"
    raise ModelError(f"the tokenizer cuts text by {told[:120]}, and no rule of llama.cpp's is known to be the same")
