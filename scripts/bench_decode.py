#!/usr/bin/env python3
"""How fast a model of the shape of Llama 3 8B writes, in bfloat16 and in each scheme, in the same run.

    scripts/bench_decode.py                                  into quant_kernels/results/<device>-decode.json
    scripts/bench_decode.py --device cpu --blocks 2 --hidden 512 --ffn 1024 --heads 8 --kv-heads 2     a small try-out

Weights are random and made on the device, so there is nothing to download or to wait for; layers that read the same
input run as one, and on a GPU a step is a captured graph, as in `netsuke generate`. Schemes take turns with bfloat16:
each is measured directly after it, and ratios are medians over such pairs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_kernels import commit, positive
from kernel_timing import say
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.runtime.decode import Decoder
from compress.runtime.modules import QuantLinear, put_in_place

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = {"w4a16": Grid(4, True, 128), "w8a16": Grid(8, True, None)}
LAUNCHES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of a block, those with the same input together."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of writing with a random model of Llama 3 8B's shape.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=positive, default=32)
    parser.add_argument("--hidden", type=positive, default=4096)
    parser.add_argument("--ffn", type=positive, default=14336)
    parser.add_argument("--heads", type=positive, default=32)
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=128256)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--tokens", type=positive, default=64, help="to write after the prompt")
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--results", type=Path, default=ROOT / "quant_kernels" / "results", help="folder")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        say(f"error: --device {options.device}: torch sees no CUDA device here. Use --device cpu for a try-out")
        return 2

    rows = []
    baseline = build(options, None)
    for scheme in options.schemes:
        model = build(options, SCHEMES[scheme])
        rows += [compared(scheme, model, baseline, batch, options) for batch in options.batch]
        del model
        gc.collect()
    name = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    shape = {key: getattr(options, key) for key in ("blocks", "hidden", "ffn", "heads", "kv_heads", "vocabulary")}
    report = {"device": name, "commit": commit(), "torch": torch.__version__, "shape": shape, "results": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{name.replace(' ', '-').lower()}-decode.json"
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render(report))
    say(f"Written to {file}")
    return 0


def build(options: argparse.Namespace, grid: Grid | None) -> Any:
    """A random Llama on the device, its linear layers on `grid` or in bfloat16; embeddings and head in bfloat16."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.ffn, num_hidden_layers=options.blocks,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        max_position_embeddings=8192, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if grid is not None:
        for index in range(options.blocks):
            for launch in LAUNCHES:
                names = [f"model.layers.{index}.{name}" for name in launch]
                layers = [model.get_submodule(name) for name in names]
                rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
                put_in_place(model, names, random_linear(rows, columns, grid, options.device))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=options.device)
        value = value.normal_(std=0.02) if value.ndim == 2 else value.fill_(1)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    with torch.device(options.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def random_linear(rows: int, columns: int, grid: Grid, device: str) -> QuantLinear:
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), dtype=torch.int8, device=device)
    scale = torch.full((rows, grid.num_groups(columns)), 0.02 / grid.qmax, dtype=torch.bfloat16, device=device)
    return QuantLinear.from_quantized(QuantizedTensor(codes, scale, None, grid), dtype=torch.bfloat16, device=device)


def compared(scheme: str, model: Any, baseline: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: both models at one batch."""
    say(f"== {scheme}, batch {batch}")
    prompt = torch.randint(options.vocabulary, (batch, options.prompt_tokens), device=options.device)
    decoders = [Decoder(each, options.prompt_tokens + options.tokens) for each in (baseline, model)]
    pairs = [[seconds(each, prompt, options.tokens) for each in decoders] for _ in range(options.repetitions + 1)][1:]
    ours = statistics.median(pair[1] for pair in pairs)
    return {
        "scheme": scheme,
        "batch": batch,
        "backend": next(layer.backend for layer in model.modules() if isinstance(layer, QuantLinear)),
        "captured": decoders[1].captures,
        "tokens_per_second": round(batch * options.tokens / ours, 1),
        "ratio_to_bfloat16": round(statistics.median(pair[0] / pair[1] for pair in pairs), 3),
    }


def seconds(decoder: Decoder, prompt: torch.Tensor, tokens: int) -> float:
    """To write `tokens` tokens after the prompt."""
    following = decoder.prefill(prompt)
    start = now(prompt)
    for _ in range(tokens):
        following = decoder.step(following)
    return now(prompt) - start


def now(on: torch.Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def render(report: dict[str, Any]) -> str:
    """Markdown."""
    shape = ", ".join(f"{value} {name}" for name, value in report["shape"].items())
    lines = [
        f"{report['device']}, commit {report['commit'][:12]}, torch {report['torch']}; {shape}.",
        "",
        "| scheme | batch | backend | captured | tokens/s | × bfloat16 |",
        "|---|--:|---|---|--:|--:|",
    ]
    for row in report["results"]:
        captured = "yes" if row["captured"] else "no"
        lines.append(
            f"| {row['scheme']} | {row['batch']} | {row['backend']} | {captured} | {row['tokens_per_second']} "
            f"| {row['ratio_to_bfloat16']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
