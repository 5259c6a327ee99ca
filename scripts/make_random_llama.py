#!/usr/bin/env python3
"""Write a Llama of random weights: as slow and as large as a trained one, and it knows nothing.

    scripts/make_random_llama.py DIR              16 blocks, 4.0 GB in bf16
    scripts/make_random_llama.py DIR --blocks 4   the same width, 1.3 GB

It is what memory and speed are measured on. Each block is drawn and written as a shard of its own, so that
making the model takes no more memory than one block of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

DEVIATION = 0.02
END = "<|end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama of random weights, block by block.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=options.blocks,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.context,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    options.directory.mkdir(parents=True, exist_ok=True)
    total = write_weights(options.directory, config, torch.Generator().manual_seed(options.seed))
    config.save_pretrained(options.directory)
    byte_tokenizer(options.context).save_pretrained(options.directory)
    print(f"{options.directory}: {options.blocks} blocks, {total:,} bytes of weights")


def write_weights(directory: Path, config: LlamaConfig, generator: torch.Generator) -> int:
    """Writes a shard for each block and one for the rest, and their index; returns the bytes of weights."""
    shard_of: dict[str, str] = {}
    total = 0
    for number in range(config.num_hidden_layers + 1):
        file = directory / f"model-{number + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        if number < config.num_hidden_layers:
            shard = random_block(config, f"model.layers.{number}.", generator)
        else:
            shard = random_ends(config, generator)
        save_file(shard, file, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(shard, file.name)
        total += sum(tensor.nbytes for tensor in shard.values())
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return total


def random_block(config: LlamaConfig, prefix: str, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv_width = config.head_dim * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    linears = {f"{prefix}{name}.weight": normal(*shape, generator=generator) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return linears | {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}


def random_ends(config: LlamaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """What stands before and after the blocks."""
    return {
        "model.embed_tokens.weight": normal(config.vocab_size, config.hidden_size, generator=generator),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
        "lm_head.weight": normal(config.vocab_size, config.hidden_size, generator=generator),
    }


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=DEVIATION, generator=generator)


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose 257 tokens are an end of text and the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=context)


if __name__ == "__main__":
    main()
