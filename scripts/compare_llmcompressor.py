#!/usr/bin/env python3
"""netsuke beside llm-compressor: the same model, tokens and grids, and one judge of what comes out.

    scripts/compare_llmcompressor.py --peer-python PEER/bin/python --model DIR --calibration FILE --test FILE

llm-compressor runs in an environment of its own. Each quantization is a process on one thread, and both
toolkits see the very same windows of tokens. Every resulting folder is then loaded by transformers with
compressed-tensors, not by its maker, and scored against the original in float32. Seconds are the CPU time of
calibrating and quantizing, memory is the peak above the imports. The table replaces what the results file has
between its two marks. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from compress.calibrate.data import Windows, calibration_windows, read_dataset
from compress.models.store import load_tokenizer
from eval.evaluate import logits_of, score_texts

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS.parent / "recipes" / "RESULTS.md"
BEGIN, END = "<!-- compare_llmcompressor -->", "<!-- /compare_llmcompressor -->"
SEED = 0


@dataclass(frozen=True)
class Cell:
    """A method and a grid that both toolkits are asked for."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    sweeps: int | None = None
    """Of netsuke's refinement after GPTQ, which its peer has not; None: as the recipe has it."""

    @property
    def title(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        plain = ", without refinement" if self.sweeps == 0 else ""
        return f"{self.method.upper()}, {self.bits} bits in groups of {self.group_size}, {kind}{plain}"

    @property
    def overrides(self) -> list[str]:
        """The cell as settings of a netsuke recipe."""
        fields = {
            "scheme": f"w{self.bits}a16",
            "group_size": self.group_size,
            "symmetric": str(self.symmetric).lower(),
        }
        if self.sweeps is not None:
            fields["sweeps"] = self.sweeps
        return [f"{self.method}.{name}={value}" for name, value in fields.items()]


CELLS = (
    Cell("rtn", bits=4, group_size=128, symmetric=True),
    Cell("gptq", bits=4, group_size=128, symmetric=True),
    Cell("gptq", bits=4, group_size=128, symmetric=True, sweeps=0),
    Cell("gptq", bits=3, group_size=128, symmetric=True),
    Cell("gptq", bits=3, group_size=128, symmetric=False),
    Cell("gptq", bits=2, group_size=64, symmetric=False),
)


@dataclass(frozen=True)
class Job:
    """One quantization: a row of the table."""

    title: str
    toolkit: str
    python: str
    script: Path
    request: dict[str, Any]

    def run(self, output: Path) -> dict[str, Any]:
        """Quantizes into `output`; returns what it cost."""
        request = json.dumps(self.request | {"output": str(output)})
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
        if self.toolkit != "netsuke":
            del environment["PYTHONPATH"]
        command = [self.python, str(self.script), request]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare netsuke with llm-compressor.")
    parser.add_argument("--peer-python", required=True, help="python of an environment with llmcompressor")
    parser.add_argument(
        "--peer-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what llm-compressor computes in, and stores every tensor in that it does not quantize",
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, help="windows of the test text to score (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.model)
    documents = read_dataset(str(options.calibration), "train", tokenizer)
    windows = calibration_windows(documents, tokenizer, samples=options.samples, length=options.length, seed=SEED)
    baseline = load_model(options.model)

    def score(folder: Path) -> dict[str, Any]:
        model = logits_of(load_model(folder))
        return score_texts(model, tokenizer, [options.test], baseline=logits_of(baseline), limit=options.limit)[0]

    with tempfile.TemporaryDirectory() as work:
        rows = list(measure(jobs(options, windows, Path(work)), Path(work) / "out", windows.hash, score))
    write_section(options.results, "\n".join([preamble(options, windows), "", *table(rows)]))


def jobs(options: argparse.Namespace, windows: Windows, work: Path) -> Iterator[Job]:
    """Both toolkits on every cell."""
    tokens = work / "windows.json"
    tokens.write_text(json.dumps(windows.tokens.tolist()), encoding="utf-8")
    ours, peers = SCRIPTS / "quantize_with_netsuke.py", SCRIPTS / "quantize_with_llmcompressor.py"
    data = {
        "samples": options.samples,
        "sequence_length": options.length,
        "seed": SEED,
    }
    calibration = [f"calibration.{name}={value}" for name, value in data.items()]
    common = {"model": str(options.model.resolve()), "calibration": str(options.calibration.resolve())}
    for cell in CELLS:
        request = common | {"recipe": f"w4a16-{cell.method}", "overrides": cell.overrides + calibration}
        yield Job(cell.title, "netsuke", sys.executable, ours, request)
        request = common | vars(cell) | {"windows": str(tokens), "dtype": options.peer_dtype}
        yield Job(cell.title, "llm-compressor", options.peer_python, peers, request)


def measure(
    todo: Iterator[Job], folder: Path, tokens_hash: str, score: Callable[[Path], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Runs, weighs and scores each job in turn; `folder` holds one result at a time."""
    for job in todo:
        cost = job.run(folder)
        if cost.get("calibration_hash") not in (None, tokens_hash):
            raise SystemExit(f"{job.title}: netsuke calibrated on other tokens than its peer was given")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        result = {"title": job.title, "toolkit": job.toolkit, "bytes": size} | cost | score(folder)
        print(row(result), file=sys.stderr)
        yield result
        shutil.rmtree(folder)


def load_model(folder: Path) -> PreTrainedModel:
    """A folder in float32; quantized layers are decompressed to plain ones by compressed-tensors."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantized = "quantization_config" in config
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def preamble(options: argparse.Namespace, windows: Windows) -> str:
    versions = "import llmcompressor, torch; print(llmcompressor.__version__, torch.__version__)"
    asked = subprocess.run([options.peer_python, "-c", versions], stdout=subprocess.PIPE, text=True, check=True)
    release, peer_torch = asked.stdout.split()[-2:]
    count, length = windows.tokens.shape
    return (
        f"`{options.model.name}`, calibrated on the same {count} × {length} tokens of "
        f"`{options.calibration.name}`, scored on `{options.test.name}` against the original. "
        f"llm-compressor {release} (torch {peer_torch}) loads the model in {options.peer_dtype}, which is also how it "
        "stores scales and whatever it does not quantize, and has its defaults otherwise; its saving is not timed, "
        f"netsuke's is. netsuke runs on torch {torch.__version__}. One thread each; ± is one standard error; "
        f"{f'the first {options.limit}' if options.limit else 'all'} windows are scored.\n\n"
        f"`scripts/compare_llmcompressor.py --peer-python PEER/bin/python --peer-dtype {options.peer_dtype} "
        f"--model {options.model.name} --calibration {options.calibration.name} --test {options.test.name}"
        f"{f' --limit {options.limit}' if options.limit else ''}`"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| what | toolkit | perplexity | ratio to original | KL divergence | top-1 | MB | CPU s | peak MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(row(each) for each in rows),
    ]


def row(result: dict[str, Any]) -> str:
    def with_error(value: str, error: str) -> str:
        """Scoring a single window leaves the error out."""
        return f"{result[value]:.5f}" + (f" ± {result[error]:.5f}" if error in result else "")

    cells = [
        result["title"],
        result["toolkit"],
        f"{result['perplexity']:.2f}",
        with_error("perplexity_ratio", "perplexity_ratio_standard_error"),
        with_error("kl_divergence", "kl_standard_error"),
        f"{result['top1_agreement']:.1%}",
        f"{result['bytes'] / 1e6:.2f}",
        f"{result['cpu_seconds']:.1f}",
        f"{result['peak_bytes'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_section(file: Path, content: str) -> None:
    """Puts the content between the marks; a file without them gets them, and a heading, at its end."""
    text = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Beside llm-compressor\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    file.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
