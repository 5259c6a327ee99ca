"""One quantization by netsuke, for compare_peer.py: the same job, the same answer as its peer's.

What is measured ends where the run begins to verify its files: until then it reads text, calibrates, quantizes and
writes. It begins when the code of the model and of its tokenizer has been imported, as it has for the peer, which is
given its tokens ready-made.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import compress.pipeline
from compress.models.store import load_tokenizer


def peak_bytes() -> int:
    """This program's largest resident memory so far; getrusage would count that of whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


job = json.loads(sys.argv[1])
torch.set_num_threads(1)
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]))
load_tokenizer(Path(job["model"]))
IMPORTS_BYTES = peak_bytes()
start = time.process_time()
cost: dict[str, float] = {}


def watch(phase: str, share: float, words: str) -> None:
    """Note the cost when calibration and quantization are done."""
    if phase == "verify" and not cost:
        cost["cpu_seconds"] = time.process_time() - start
        cost["peak_bytes"] = peak_bytes() - IMPORTS_BYTES


report = compress.pipeline.run(
    job["recipe"],
    model=job["model"],
    output=job["output"],
    calibration=job["calibration"],
    overrides=job["overrides"],
    progress=watch,
)
print(json.dumps(cost | {"calibration_hash": (report["calibration"] or {}).get("hash")}))
