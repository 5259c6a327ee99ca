#!/usr/bin/env python3
"""Does memory follow one block, or the model? Compress two models that differ only in depth, and look.

    scripts/bench_memory.py                       4 and 16 blocks (1.3 and 4.0 GB) under a limit of 2.5 GB
    scripts/bench_memory.py --hidden 512 --ffn 1024 --heads 8 --limit 1.2e9      a small try-out

The limit is hard: a cgroup where this user may make one, otherwise a limit on the address space that leaves
out what importing torch alone maps. A run that needs more is killed, or fails, and the table says so. Of the
two peaks, the resident set also counts mapped weight files, which the kernel could drop; the anonymous memory
is the process's own. Linux only. --work should be on a disk, not in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NETSUKE = [sys.executable, "-c", "import sys; from compress.cli import main; sys.exit(main())"]
MAKE_MODEL = ROOT / "scripts/make_random_llama.py"
IMPORTS_ALONE = [sys.executable, "-c", "import torch, transformers"]
DONE = (0, 3)
"""3: done, and a gate of the recipe was missed, as a model of random weights may."""
POLL_SECONDS = 0.05
CALIBRATION_TOKENS = 512
RECIPES = {
    "w4a16-rtn": (),
    "w4a16-gptq": (
        "calibration.samples=8",
        f"calibration.sequence_length={CALIBRATION_TOKENS}",
        "evaluation.samples=2",
    ),
}
"""Shipped recipes and what is set on them: enough windows to pass through GPTQ, too few to wait for."""

Enter = Callable[[], None]
"""Called in a new process to put it under the limit."""


@dataclass(frozen=True)
class Run:
    """One process from start to end."""

    returncode: int
    seconds: float
    peak_resident_bytes: int
    peak_anonymous_bytes: int
    last_words: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory of netsuke over the depth of a model.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--set", nargs="+", default=[], help="more settings, for quicker runs: gptq.sweeps=0")
    parser.add_argument("--limit", type=float, default=2.5e9, help="bytes")
    parser.add_argument("--work", type=Path, help="where models are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.work) as work, memory_limit(int(options.limit)) as limit:
        how, enter = limit
        results = measure(Path(work), options, enter)
    imports = run(IMPORTS_ALONE).peak_resident_bytes
    print(f"Limit: {mb(int(options.limit))} MB by {how}. Importing torch and transformers: {mb(imports)} MB.\n")
    print_table(results)
    if options.json:
        content = {"limit_bytes": int(options.limit), "limit": how, "imports_bytes": imports, "runs": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result["returncode"] in DONE for result in results) else 1


def measure(work: Path, options: argparse.Namespace, enter: Enter) -> list[dict[str, object]]:
    """Every recipe on every depth, one process each."""
    text = work / "calibration.txt"
    text.write_text(random_text(num_bytes=CALIBRATION_TOKENS * 64), encoding="utf-8")
    results: list[dict[str, object]] = []
    for blocks in options.blocks:
        model = work / f"model-{blocks}"
        sizes = f"--blocks {blocks} --hidden {options.hidden} --ffn {options.ffn}"
        heads = f"--heads {options.heads} --kv-heads {options.heads}"
        make = [sys.executable, str(MAKE_MODEL), str(model), *sizes.split(), *heads.split()]
        subprocess.run(make, check=True, stdout=sys.stderr)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for recipe in options.recipes:
            settings = (*RECIPES[recipe], *options.set)
            output = work / f"{recipe}-{blocks}"
            command = [*NETSUKE, "run", recipe, f"--model={model}", f"--output={output}"]
            command += [f"--set={setting}" for setting in settings]
            command += [f"--calibration={text}"] if RECIPES[recipe] else []
            print(f"{recipe} on {blocks} blocks …", file=sys.stderr)
            facts = {"recipe": recipe, "blocks": blocks, "weights_bytes": weights}
            results.append(facts | asdict(run(command, enter)))
    return results


def run(command: list[str], enter: Enter | None = None) -> Run:
    """Runs a command to its end, watching its memory."""
    start = time.perf_counter()
    anonymous = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=enter)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        told = errors.read().decode(errors="replace").strip()
        last_words = told[-2000:] if process.returncode not in DONE else ""
    seconds = time.perf_counter() - start
    return Run(process.returncode, seconds, usage.ru_maxrss * 1024, anonymous, last_words)


def anonymous_bytes(pid: int) -> int:
    """The memory of a process that no file could give back; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields.get("RssAnon", "0 kB").split()[0]) * 1024


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[tuple[str, Enter]]:
    """The hardest limit this user may set: how it is set, and how a process enters it."""
    name = f"netsuke-bench-{os.getpid()}"
    kinds = {
        "cgroup v1": (Path("/sys/fs/cgroup/memory") / name, "memory.limit_in_bytes"),
        "cgroup v2": (Path("/sys/fs/cgroup") / name, "memory.max"),
    }
    for how, (group, limit) in kinds.items():
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(num_bytes))
                yield how, partial(enter_group, group)
                return
        finally:
            group.rmdir()
    extent = address_space_of_imports() + num_bytes - run(IMPORTS_ALONE).peak_resident_bytes
    yield "RLIMIT_AS", lambda: resource.setrlimit(resource.RLIMIT_AS, (extent, extent))


def enter_group(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def address_space_of_imports() -> int:
    """What importing torch maps, most of it never touched."""
    code = IMPORTS_ALONE[-1] + "; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields["VmPeak"].split()[0]) * 1024


def random_text(num_bytes: int) -> str:
    """Lines of made-up words, always the same."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(500)]
    text = ""
    while len(text) < num_bytes:
        text += " ".join(draw.choices(words, k=12)) + ".\n"
    return text


def print_table(results: list[dict[str, object]]) -> None:
    print("| recipe | blocks | weights, MB | peak resident, MB | of it anonymous, MB | seconds | ended |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for each in results:
        code = each["returncode"]
        ended = "done" if code in DONE else "killed at the limit" if code == -9 else f"exit {code}"
        sizes = [mb(each[key]) for key in ("weights_bytes", "peak_resident_bytes", "peak_anonymous_bytes")]
        print(f"| {each['recipe']} | {each['blocks']} | {' | '.join(sizes)} | {each['seconds']:.0f} | {ended} |")
    for each in results:
        if each["last_words"]:
            print(f"\n{each['recipe']} on {each['blocks']} blocks said:\n{each['last_words']}", file=sys.stderr)


def mb(num_bytes: object) -> str:
    return f"{int(str(num_bytes)) / 1e6:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
