#!/usr/bin/env python3
"""Our GGUF files beside those of llama.cpp's own quantizer, all of them run by llama.cpp.

    scripts/compare_gguf.py --models DIR... --calibration FILE --test FILE... [--kinds Q4_K Q6_K Q4_0] [--samples N]

Of each type there are four files of the same size: llama.cpp's without an importance matrix, ours from the weights
alone, ours fitted to a text that the first model writes itself, and ours fitted to the calibration text. Q4_0 has a
fifth, the codes of a GPTQ run as they are. All are quantized from the same float32 file and keep in float32 what is
outside the blocks. Losses are against llama.cpp's own float32 logits, over windows of 512 tokens of all texts together.

What rounding does to a perplexity is for the most part chance, the same in every window: give several models that
compute the same in another order (`equal_llama.py --shuffle`), and all numbers are means over them, with the standard
error among models, in the last two columns of the difference of each model's files. Rows of a multiple of 256 weights
are needed (`equal_llama.py --hidden`). Needs llama.cpp through cyllama.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llama_cpp_files import VERSION, quantize
from torch import Tensor

from compress.models.store import load_tokenizer
from eval.evaluate import LogitsModel, score_texts
from eval.llama_cpp import LlamaCpp

RECIPE = """
calibration: {{dataset: {calibration}, samples: 128, sequence_length: 512}}
stages: [gptq: {{scheme: w4a16, group_size: 32, asymmetric: true, ignore: [lm_head]}}]
checkpoint: {{format: gptq}}
evaluation: {{samples: 1}}
"""
HEADER = """
| type | codes by | MB | log perplexity ratio | KL divergence | ratio over llama.cpp's | KL over llama.cpp's |
|---|---|--:|--:|--:|--:|--:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--kinds", nargs="+", default=["Q4_K", "Q6_K", "Q4_0"])
    parser.add_argument("--samples", type=int, default=24, help="windows of each text")
    options = parser.parse_args()
    sizes: dict[tuple[str, str], float] = {}
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        options.own = Path(scratch) / "own.jsonl"
        netsuke("write", options.models[0], "--output", options.own)
        for model in options.models:
            tokenizer = load_tokenizer(model)
            original = Path(scratch) / "original.gguf"
            netsuke("convert", model, "--to", "gguf-f32", "--output", original, "--overwrite")
            baseline = LlamaCpp(original)
            remembered = once(baseline)
            for kind, maker, file in files(model, options, original, Path(scratch)):
                scores = score_texts(
                    LlamaCpp(file),
                    tokenizer,
                    options.test,
                    baseline=remembered,
                    context=512,
                    limit=options.samples,
                )
                loss = (
                    fmean(math.log(score["perplexity_ratio"]) for score in scores),
                    fmean(score["kl_divergence"] for score in scores),
                )
                print(f"{model.name}: {kind} by {maker}: {loss[0]:+.5f} {loss[1]:.5f}", file=sys.stderr, flush=True)
                losses.setdefault((kind, maker), []).append(loss)
                sizes[kind, maker] = file.stat().st_size / 1e6
                file.unlink()
    print(f"Quantized by {VERSION}, run by {baseline.runs_on}, {len(options.models)} models\n{HEADER}")
    for (kind, maker), found in losses.items():
        ratios, divergences = zip(*found, strict=True)
        over = [
            [here - there for here, there in zip(column, theirs, strict=True)]
            for column, theirs in zip((ratios, divergences), zip(*losses[kind, "llama.cpp"], strict=True), strict=True)
        ]
        told = [mean(column) for column in (ratios, divergences, *(over if maker != "llama.cpp" else ()))]
        print("|", " | ".join([kind, maker, f"{sizes[kind, maker]:.1f}", *told, *[""] * (4 - len(told))]), "|")


def once(model: LogitsModel) -> LogitsModel:
    """The same, with logits that are kept: 2 MB of each window for 1,000 words of a vocabulary."""
    kept: dict[bytes, Tensor] = {}

    def logits(input_ids: Tensor, /) -> Tensor:
        key = input_ids.numpy().tobytes()
        if key not in kept:
            kept[key] = model(input_ids)
        return kept[key]

    return logits


def mean(values: Sequence[float]) -> str:
    """With its standard error, where there are several."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.5f}" if len(values) > 1 else ""
    return f"{fmean(values):.5f}{error}"


def files(model: Path, options: argparse.Namespace, original: Path, scratch: Path) -> Iterator[tuple[str, str, Path]]:
    file = scratch / "model.gguf"
    for kind in options.kinds:
        quantize(original, file, kind)
        yield kind, "llama.cpp", file
        to = f"gguf-{kind.lower()}"
        netsuke("convert", model, "--to", to, "--output", file)
        yield kind, "range search", file
        for text, said in ((options.own, "its own text"), (options.calibration, "a text")):
            netsuke("convert", model, "--to", to, "--output", file, "--calibration", text)
            yield kind, f"fitted to {said}", file
        if kind == "Q4_0":
            recipe = scratch / "gptq.yaml"
            recipe.write_text(RECIPE.format(calibration=options.calibration))
            netsuke("run", recipe, "--model", model, "--output", scratch / "gptq", "--overwrite")
            netsuke("convert", scratch / "gptq", "--to", to, "--output", file)
            yield kind, "GPTQ, made up for earlier layers", file


def netsuke(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "compress.cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
