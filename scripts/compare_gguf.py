#!/usr/bin/env python3
"""Our GGUF files beside those of llama.cpp's own quantizer, all of them run by llama.cpp.

    scripts/compare_gguf.py --model DIR --calibration FILE --test FILE [--kinds Q4_K Q6_K Q4_0] [--samples N]

Of each type there are three files of the same size: llama.cpp's without an importance matrix, ours from the weights
alone, and ours fitted to the calibration text. Q4_0 has a fourth, the codes of a GPTQ run as they are. All are
quantized from the same float32 file and keep in float32 what is outside the blocks. The divergence is of llama.cpp's
own float32 logits, over windows of 512 tokens. Rows of a multiple of 256 weights are needed: see `pad_llama.py`.
Needs cyllama.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_cpp_files import VERSION, quantize

from compress.models.store import load_tokenizer
from eval.evaluate import score_texts
from eval.llama_cpp import LlamaCpp

RECIPE = """
calibration: {{dataset: {calibration}, samples: 128, sequence_length: 512}}
stages: [gptq: {{scheme: w4a16, group_size: 32, asymmetric: true, ignore: [lm_head]}}]
checkpoint: {{format: gptq}}
evaluation: {{samples: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["Q4_K", "Q6_K", "Q4_0"])
    parser.add_argument("--samples", type=int, default=24)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original.gguf"
        netsuke("convert", options.model, "--to", "gguf-f32", "--output", original)
        print(f"{VERSION}\n\n| type | codes by | MB | perplexity ratio | KL divergence |\n|---|---|--:|--:|--:|")
        for kind, maker, file in files(options, original, Path(scratch)):
            (score,) = score_texts(
                LlamaCpp(file),
                tokenizer,
                [options.test],
                baseline=LlamaCpp(original),
                context=512,
                limit=options.samples,
            )
            ratio, divergence = (
                f"{score[name]:.5f} ± {score[error]:.5f}"
                for name, error in (
                    ("perplexity_ratio", "perplexity_ratio_standard_error"),
                    ("kl_divergence", "kl_standard_error"),
                )
            )
            size = file.stat().st_size / 1e6
            print(f"| {kind} | {maker} | {size:.1f} | {ratio} | {divergence} |", flush=True)
            file.unlink()


def files(options: argparse.Namespace, original: Path, scratch: Path) -> Iterator[tuple[str, str, Path]]:
    file = scratch / "model.gguf"
    for kind in options.kinds:
        quantize(original, file, kind)
        yield kind, "llama.cpp", file
        to = f"gguf-{kind.lower()}"
        netsuke("convert", options.model, "--to", to, "--output", file)
        yield kind, "range search", file
        netsuke("convert", options.model, "--to", to, "--output", file, "--calibration", options.calibration)
        yield kind, "fitted to a text", file
        if kind == "Q4_0":
            recipe = scratch / "gptq.yaml"
            recipe.write_text(RECIPE.format(calibration=options.calibration))
            netsuke("run", recipe, "--model", options.model, "--output", scratch / "gptq")
            netsuke("convert", scratch / "gptq", "--to", to, "--output", file)
            yield kind, "GPTQ, made up for earlier layers", file


def netsuke(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "compress.cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
