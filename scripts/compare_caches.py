#!/usr/bin/env python3
"""Quantized KV caches beside each other: what decoding from them changes, and what they take.

    scripts/compare_caches.py --model DIR --test FILE
    scripts/compare_caches.py --model DIR --test FILE --windows 16 --results /tmp/try.md

Every token of a window but its first reads a cache (`eval.decode_path`), and the baseline is the same model with the
cache of transformers. It replaces what the results file has between the marks of this model. Memory is that of random
keys and values of a usual shape in bfloat16, in a process for each scheme. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

from compress.core.kv import KV_SCHEMES, TOKENS, KVScheme
from compress.core.scheme import Grid
from compress.runtime.attention import quantized_cache
from compress.runtime.cache import QuantizedCache
from eval.decode_path import DecodePath
from eval.evaluate import Score, default_batch_size, default_context, score_windows
from eval.texts import prepended_bos, read_streams, windows

RESULTS = Path(__file__).resolve().parents[1] / "recipes" / "RESULTS.md"
SCHEMES = {name: scheme for name, scheme in KV_SCHEMES.items() if not scheme.static}
"""All that need no calibration."""
PROMPTS, GENERATED = 32, 64
"""Prompts that a model goes on from, and tokens that it adds; together they are as long as a window."""
FILLED, CHUNK = 8192, 512
"""Tokens whose memory is measured, and how many come at once."""
LAYERS, KV_HEADS, HEAD_DIM = 4, 8, 128


@dataclass(frozen=True)
class Bench:
    """A model with its texts."""

    model: Any
    rows: Tensor
    """Windows of the text that are scored, [n, context]."""
    prompts: Tensor
    """[n, context - GENERATED]"""
    held: list[Any] = field(default_factory=list)
    """The cache that was made last."""

    @property
    def batch_size(self) -> int:
        return default_batch_size(self.rows.shape[1], self.model.config.vocab_size)

    def path(self, scheme: KVScheme | None, prompt: int = 1) -> DecodePath:
        def new() -> Any:
            self.held[:] = [quantized_cache(self.model, scheme) if scheme else DynamicCache(config=self.model.config)]
            return self.held[0]

        return DecodePath(self.model, new, prompt, step=None)

    def score(self, scheme: KVScheme) -> Score:
        return score_windows(scheme.name, self.path(scheme), self.rows, self.path(None), self.batch_size)

    def continued(self) -> Tensor:
        """Prompts and what the plain cache goes on with, greedily."""
        done = []
        for tokens in self.prompts.split(self.batch_size):
            cache, newest = DynamicCache(config=self.model.config), tokens
            for _ in range(GENERATED):
                newest = self.model(newest, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
                tokens = torch.cat((tokens, newest), dim=1)
            done.append(tokens)
        return torch.cat(done)

    def agreement(self, scheme: KVScheme, tokens: Tensor) -> Tensor:
        """Whether this cache makes the same choices after the same tokens, [n, GENERATED]."""
        prompt, same = self.prompts.shape[1], []
        for part in tokens.split(self.batch_size):
            logits = self.path(scheme, prompt)(part)
            same.append(logits[:, prompt - 1 : -1].argmax(dim=-1) == part[:, prompt:])
        return torch.cat(same)

    def token_bytes(self, scheme: KVScheme) -> tuple[float, float]:
        """Of a token in a window, all layers: measured, and by arithmetic."""
        config, tokens = self.model.config, self.rows.shape[1]
        self.path(scheme, tokens - 1)(self.rows[:1])  # the last one alone: what came together leaves the window later
        of_head = scheme.num_bytes(tokens, config.head_dim, self.model.dtype.itemsize) / tokens
        return used_bytes(self.held[0]) / tokens, of_head * config.num_hidden_layers * config.num_key_value_heads


@dataclass(frozen=True)
class Filled:
    """What a cache takes once it is full."""

    used: int
    """Bytes of its tensors, without room for more tokens."""
    tensors: int
    """With it."""
    process: int
    """Bytes that the process has grown by."""


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    bench = opened(options)
    context, plain = bench.rows.shape[1], plain_bytes(bench.model.config, bench.model.dtype.itemsize)
    command = shlex.join(["scripts/compare_caches.py", *map(os.path.basename, sys.argv[1:])])
    with torch.inference_mode():
        parts = [
            f"{options.model.name}, {len(bench.rows)} windows of {context} tokens of {options.test.name} in float32; "
            f"± is one standard error over windows. `{command}`",
            f"Schemes. A token takes {plain:,} bytes in the plain cache; those of a scheme are a mean over {context} "
            f"tokens, with the ones that stay in float32. The last two columns: {len(bench.prompts)} prompts of "
            f"{bench.prompts.shape[1]} tokens, to which the plain cache adds {GENERATED} greedily; how often a scheme "
            "chooses the same after the same tokens, and in how many texts always.",
            table(scheme_rows(bench)),
            f"Keys with a scale for each channel of {TOKENS} tokens, and with one for each token and head. No rotation "
            f"and no sinks; both with a window of {TOKENS} tokens, the smallest that can be.",
            table(granularity_rows(bench)),
        ]
    parts += [
        f"Memory. {FILLED:,} tokens of random keys and values, {LAYERS} layers, {KV_HEADS} heads of {HEAD_DIM}, in "
        f"bfloat16, {CHUNK} at once. Tensors have room for more tokens, which the process may not have touched.",
        table(memory_rows()),
    ]
    write(options.results, options.model.name, "\n\n".join(parts))
    print("\n\n".join(parts))
    return 0


def opened(options: argparse.Namespace) -> Bench:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    (stream,) = read_streams([options.test], tokenizer).values()
    rows = windows(stream, default_context(model.config), prepended_bos(tokenizer))
    return Bench(model, rows[: options.windows], rows[-PROMPTS:, : rows.shape[1] - GENERATED])


def scheme_rows(bench: Bench) -> Iterator[Sequence[str]]:
    yield ("scheme", "bytes per token", "measured / arithmetic", "perplexity", "KL divergence", "same top token",
           "same choice", "same text")  # fmt: skip
    plain = score_windows("plain", bench.path(None), bench.rows, None, bench.batch_size)
    size = plain_bytes(bench.model.config, bench.model.dtype.itemsize)
    yield "plain", f"{size:,}", "", f"{plain.perplexity:.3f}", "", "", "", ""
    tokens = bench.continued()
    for name, scheme in SCHEMES.items():
        score, same = bench.score(scheme), bench.agreement(scheme, tokens).double()
        measured, stated = bench.token_bytes(scheme)
        yield (name, f"{measured:,.0f}", f"{measured / stated:.4f}", f"{score.perplexity:.3f}", kl(score),
               f"{score.top1_agreement:.2%}", f"{same.mean():.2%}", f"{same.amin(dim=1).mean():.0%}")  # fmt: skip


def granularity_rows(bench: Bench) -> Iterator[Sequence[str]]:
    yield "keys", "values", "KL divergence per token", "KL divergence per channel", "ratio"
    for bits in (4, 2):
        sides = Grid(bits, symmetric=False), Grid(bits, symmetric=False, group_size=1, rows=TOKENS)
        for values in (Grid(8), Grid(bits, symmetric=False, group_size=32)):
            token, channel = (bench.score(KVScheme(keys, values, window=TOKENS)) for keys in sides)
            yield (f"{bits} bits", f"{values.bits} bits", kl(token), kl(channel),
                   f"{(channel.kl_divergence or 0) / (token.kl_divergence or 1):.3f}")  # fmt: skip


def memory_rows() -> Iterator[Sequence[str]]:
    yield "scheme", "bytes per token", "measured / arithmetic", "of plain", "MB of tensors", "MB of the process"
    plain = LAYERS * KV_HEADS * 2 * HEAD_DIM * 2
    for name in (None, *SCHEMES):
        filled, stated = alone(fill, name), float(plain)
        if name:
            stated = LAYERS * KV_HEADS * SCHEMES[name].num_bytes(FILLED, HEAD_DIM) / FILLED
        measured = filled.used / FILLED
        yield (name or "plain", f"{measured:,.0f}", f"{measured / stated:.4f}", f"{measured / plain:.3f}",
               f"{filled.tensors / 1e6:.1f}", f"{filled.process / 1e6:.1f}")  # fmt: skip


def fill(name: str | None) -> Filled:
    """Give a cache of this scheme, or a plain one, its tokens; the last one alone, as in decoding."""
    config = LlamaConfig(
        hidden_size=KV_HEADS * HEAD_DIM, num_hidden_layers=LAYERS, num_attention_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    generator = torch.Generator().manual_seed(0)
    cache = QuantizedCache(config, SCHEMES[name]) if name else DynamicCache(config=config)
    add(QuantizedCache(config, SCHEMES[name]) if name else DynamicCache(config=config), CHUNK, generator)
    before = resident()
    for tokens in (*[CHUNK] * (FILLED // CHUNK - 1), CHUNK - 1, 1):
        add(cache, tokens, generator)
    return Filled(used_bytes(cache), held_bytes(cache), resident() - before)


def add(cache: Any, tokens: int, generator: torch.Generator) -> None:
    for layer in range(LAYERS):
        keys, values = (
            torch.empty(1, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16).normal_(generator=generator)
            for _ in range(2)
        )
        cache.update(keys, values, layer)


def alone(function: Callable[..., Filled], *arguments: Any) -> Filled:
    """The result of a new process, in which a tensor that is freed leaves no hole behind."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held_bytes(cache: Any) -> int:
    if isinstance(cache, QuantizedCache):
        return cache.nbytes
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def used_bytes(cache: Any) -> int:
    return held_bytes(cache) - (cache.room_nbytes if isinstance(cache, QuantizedCache) else 0)


def plain_bytes(config: Any, itemsize: int) -> int:
    return config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * itemsize


def kl(score: Score) -> str:
    error = "" if score.kl_standard_error is None else f" ± {score.kl_standard_error:.2g}"
    return f"{score.kl_divergence:.3g}{error}"


def table(rows: Iterator[Sequence[str]]) -> str:
    """Markdown; the first row is the heading. Rows are printed as they come."""
    lines = []
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], file=sys.stderr)
        if len(lines) == 1:
            lines.append("|---|" + "--:|" * (len(row) - 1))
    return "\n".join(lines)


def write(file: Path, model: str, content: str) -> None:
    """Put the content between its marks, at the end of the file where there are none yet."""
    begin, end = f"<!-- compare_caches {model} -->", f"<!-- /compare_caches {model} -->"
    text = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n## KV caches of {model}\n\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    file.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=48, help="windows of the test text that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that the tables are written to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
