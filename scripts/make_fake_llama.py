#!/usr/bin/env python3
"""Write a Llama that weighs nothing: real headers, holes for weights.

    scripts/make_fake_llama.py DIR                a 70B Llama 3, 141 GB to look at, 200 kB on disk
    scripts/make_fake_llama.py DIR --layers 16    fewer blocks of the same width

Every shard has the true safetensors header and the true length, but the file is sparse: the weights read as
zeros and take no space. It is for `netsuke plan`, which must finish in seconds and touch no weight. Needs
nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

BYTES_PER_WEIGHT = 2
MAX_SHARD_BYTES = 5_000_000_000

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama of headers and holes.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--ffn", type=int, default=28672)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--context", type=int, default=8192)
    options = parser.parse_args()

    options.directory.mkdir(parents=True, exist_ok=True)
    total = write_weights(options.directory, llama_shapes(options))
    write_json(options.directory / "config.json", llama_config(options))
    write_tokenizer(options.directory)
    blocks = sum(file.stat().st_blocks * 512 for file in options.directory.iterdir())
    print(f"{options.directory}: {total:,} bytes of weights to read about, {blocks:,} bytes on disk")


def llama_shapes(options: argparse.Namespace) -> Shapes:
    """Every tensor of the model in the order it is stored, [out, in] for the linear layers."""
    hidden, ffn, vocabulary = options.hidden, options.ffn, options.vocabulary
    kv_width = hidden // options.heads * options.kv_heads
    block: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    blocks = {f"model.layers.{i}.{name}": shape for i in range(options.layers) for name, shape in block.items()}
    embedding = {"model.embed_tokens.weight": (vocabulary, hidden)}
    return embedding | blocks | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def num_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BYTES_PER_WEIGHT


def write_weights(directory: Path, shapes: Shapes) -> int:
    """Writes the shards and their index; returns the bytes of weights they claim to hold."""
    shards: list[Shapes] = [{}]
    room = MAX_SHARD_BYTES
    for name, shape in shapes.items():
        if num_bytes(shape) > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = shape
        room -= num_bytes(shape)

    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_hollow_shard(file, shard)
        shard_of |= dict.fromkeys(shard, file.name)
    total = sum(num_bytes(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    write_json(directory / "model.safetensors.index.json", index)
    return total


def write_hollow_shard(file: Path, shapes: Shapes) -> None:
    """A safetensors file (length of the header, header, data) whose data is one hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        out.truncate(8 + len(encoded) + end)


def llama_config(options: argparse.Namespace) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.hidden // options.heads,
        "max_position_embeddings": options.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_tokenizer(directory: Path) -> None:
    """A tokenizer whose 257 tokens are an end of text and the bytes, spelt as byte-level BPE spells them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    end = {"id": 0, "content": "<|end|>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    write_json(directory / "tokenizer.json", tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>"}
    write_json(directory / "tokenizer_config.json", config)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
