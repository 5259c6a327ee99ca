#!/usr/bin/env python3
"""netsuke beside another toolkit: the same model, tokens and grids, and one judge of what comes out.

    scripts/compare_peer.py PEER --peer-python PEER/bin/python --model DIR --calibration FILE --test FILE

PEER is llm-compressor (llm-compressor-sparse for its pruners), gptqmodel or auto-round, which runs in an environment of
its own. Each compression is a process on one thread, and both toolkits see the very same windows of tokens. Every
resulting folder is then loaded by transformers with compressed-tensors, not by its maker, and scored against the
original in float32. Seconds are the CPU time of calibrating and compressing, memory is the peak above the imports. The
table replaces what the results file has between the two marks of this peer. Linux only.
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
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from compress.calibrate.data import Windows, calibration_windows, read_dataset
from compress.models.store import load_tokenizer
from eval.evaluate import logits_of, score_texts

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS.parent / "recipes" / "RESULTS.md"
SEED = 0
SAMPLES = 128
EARLIER = ", made up for earlier layers"
EARLIER_OURS = f"{EARLIER} by netsuke"


@dataclass(frozen=True)
class Cell:
    """A method and a grid that both toolkits are asked for."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    only_ours: tuple[str, ...] = ()
    """Settings of netsuke's stage for which its peer has no like."""
    words: str = ""
    """What those do."""
    alone: bool = False
    """Whether the peer has nothing like it."""

    @property
    def title(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.method.upper()}, {self.bits} bits in groups of {self.group_size}, {kind}{self.words}"

    @property
    def recipe(self) -> str:
        """The netsuke recipe that does it."""
        return f"w4a16-{self.method}"

    @property
    def overrides(self) -> list[str]:
        """The cell as settings of that recipe."""
        fields = (
            f"scheme=w{self.bits}a16",
            f"group_size={self.group_size}",
            f"symmetric={str(self.symmetric).lower()}",
        )
        return [f"{self.method}.{field}" for field in fields + self.only_ours]


@dataclass(frozen=True)
class SparseCell:
    """A pruner and a pattern of zeros that both toolkits are asked for."""

    method: str
    pattern: str
    """A share of zeros, or N:M."""
    only_ours: tuple[str, ...] = ()
    words: str = ""
    alone: bool = False
    recipe: ClassVar[str] = "sparse-2of4"

    @property
    def title(self) -> str:
        return f"{self.method}, {self.pattern}{self.words}"

    @property
    def overrides(self) -> list[str]:
        """The cell as settings of the recipe."""
        pattern = [f'pattern="{self.pattern}"'] if ":" in self.pattern else ["pattern=null", f"sparsity={self.pattern}"]
        fields = (*pattern, f"method={self.method}", *self.only_ours)
        return [*(f"sparsify.{field}" for field in fields), "checkpoint.format=dense"]


@dataclass(frozen=True)
class Peer:
    """Another toolkit."""

    name: str
    module: str
    script: Path
    cells: tuple[Cell | SparseCell, ...]
    words: str
    """How it was used."""


PEERS = {
    "llm-compressor": Peer(
        "llm-compressor",
        "llmcompressor",
        SCRIPTS / "quantize_with_llmcompressor.py",
        (
            Cell("rtn", bits=4, group_size=128, symmetric=True),
            Cell("gptq", bits=4, group_size=128, symmetric=True),
            Cell("gptq", 4, 128, symmetric=True, only_ours=("sweeps=0",), words=", without refinement"),
            Cell("gptq", bits=3, group_size=128, symmetric=True),
            Cell("gptq", bits=3, group_size=128, symmetric=False),
            Cell("gptq", bits=2, group_size=64, symmetric=False),
        ),
        "which is also how it stores scales and whatever it does not quantize, and has its defaults otherwise",
    ),
    "llm-compressor-sparse": Peer(
        "llm-compressor",
        "llmcompressor",
        SCRIPTS / "quantize_with_llmcompressor.py",
        tuple(
            SparseCell(method, pattern, *extra)
            for pattern in ("2:4", "0.5")
            for method in ("sparsegpt", "wanda")
            for extra in ((), (("refit=false",), ", without refit", True))
        ),
        "which is also how it stores weights, and has its defaults otherwise; it does not refit",
    ),
    "gptqmodel": Peer(
        "gptqmodel",
        "gptqmodel",
        SCRIPTS / "quantize_with_gptqmodel.py",
        (
            Cell("gptq", 3, 128, symmetric=False, only_ours=("asymmetric=true",), words=EARLIER_OURS),
            Cell("gptq", 2, 64, symmetric=False, only_ours=("asymmetric=true",), words=EARLIER_OURS),
        ),
        "and has its defaults otherwise; it is scored with its own rounded weights",
    ),
    "auto-round": Peer(
        "auto-round",
        "auto_round",
        SCRIPTS / "quantize_with_autoround.py",
        (
            Cell("gptq", 3, 128, symmetric=False, only_ours=("asymmetric=true",), words=EARLIER, alone=True),
            Cell("gptq", 2, 64, symmetric=False, only_ours=("asymmetric=true",), words=EARLIER, alone=True),
            Cell("autoround", 2, 64, symmetric=False, only_ours=("start=gptq",), words=", from GPTQ"),
            Cell("autoround", bits=3, group_size=128, symmetric=False),
        ),
        "and learns for 200 iterations of 8 windows as netsuke does; it is scored with its own rounded weights",
    ),
}


@dataclass(frozen=True)
class Job:
    """One compression: a row of the table."""

    title: str
    toolkit: str
    python: str
    script: Path
    request: dict[str, Any]

    def run(self, output: Path) -> dict[str, Any]:
        """Compresses into `output`; returns what it cost."""
        request = json.dumps(self.request | {"output": str(output)})
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
        if self.toolkit != "netsuke":
            del environment["PYTHONPATH"]
        command = [self.python, str(self.script), request]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare netsuke with another toolkit.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--peer-python", required=True, help="python of an environment that has it")
    parser.add_argument(
        "--peer-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the peer computes in, and stores every tensor in that it does not quantize",
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, help="windows of the test text to score (default: all)")
    parser.add_argument("--only", default="", help="only rows with this in their name; they are printed, not kept")
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
    if options.only:
        return
    write_section(options.results, options.peer, "\n".join([preamble(options, windows), "", *table(rows)]))


def jobs(options: argparse.Namespace, windows: Windows, work: Path) -> Iterator[Job]:
    """Both toolkits on every cell."""
    tokens = work / "windows.json"
    tokens.write_text(json.dumps(windows.tokens.tolist()), encoding="utf-8")
    ours, peer = SCRIPTS / "quantize_with_netsuke.py", PEERS[options.peer]
    data = {
        "samples": options.samples,
        "sequence_length": options.length,
        "seed": SEED,
    }
    calibration = [f"calibration.{name}={value}" for name, value in data.items()]
    common = {"model": str(options.model.resolve()), "calibration": str(options.calibration.resolve())}
    for cell in (cell for cell in peer.cells if options.only in cell.title):
        request = common | {"recipe": cell.recipe, "overrides": cell.overrides + calibration}
        yield Job(cell.title, "netsuke", sys.executable, ours, request)
        if cell.alone:
            continue
        request = common | vars(cell) | {"windows": str(tokens), "dtype": options.peer_dtype}
        yield Job(cell.title, peer.name, options.peer_python, peer.script, request)


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
    peer = PEERS[options.peer]
    versions = f"import {peer.module}, torch; print({peer.module}.__version__, torch.__version__)"
    asked = subprocess.run([options.peer_python, "-c", versions], stdout=subprocess.PIPE, text=True, check=True)
    release, peer_torch = asked.stdout.split()[-2:]
    count, length = windows.tokens.shape
    return (
        f"`{options.model.name}`, calibrated on the same {count} × {length} tokens of "
        f"`{options.calibration.name}`, scored on `{options.test.name}` against the original. "
        f"{peer.name} {release} (torch {peer_torch}) loads the model in {options.peer_dtype}, {peer.words}. Its "
        f"saving is not timed, netsuke's is. netsuke runs on torch {torch.__version__}. One thread each; ± is one "
        f"standard error; {f'the first {options.limit}' if options.limit else 'all'} windows are scored.\n\n"
        f"`scripts/compare_peer.py {options.peer} --peer-python PEER/bin/python --peer-dtype {options.peer_dtype} "
        f"--model {options.model.name} --calibration {options.calibration.name} --test {options.test.name}"
        f"{f' --samples {count}' if count != SAMPLES else ''}{f' --limit {options.limit}' if options.limit else ''}`"
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


def write_section(file: Path, peer: str, content: str) -> None:
    """Puts the content between the marks; a file without them gets them, and a heading, at its end."""
    begin, end = f"<!-- compare_peer {peer} -->", f"<!-- /compare_peer {peer} -->"
    text = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n## Beside {peer}\n\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    file.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
