"""One quantization by auto-round, for compare_peer.py; runs in auto-round's own environment.

Takes one job as JSON on the command line, prints what it cost as JSON in the last line of standard output. The folder
holds the weights that auto-round computes with, rounded but not packed: any loader reads them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def peak_bytes() -> int:
    """This program's largest resident memory so far; getrusage would count that of whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


IMPORTS_BYTES = peak_bytes()

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
windows = json.loads(Path(job["windows"]).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(job["model"])
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])

start = time.process_time()
rounding = AutoRound(
    model,
    tokenizer,
    scheme={"bits": job["bits"], "group_size": job["group_size"], "sym": job["symmetric"], "data_type": "int"},
    dataset=[torch.tensor([row]) for row in windows],
    nsamples=len(windows),
    seqlen=len(windows[0]),
    iters=200,
    batch_size=8,
    device_map="cpu",
    enable_torch_compile=False,
)
model, _ = rounding.quantize()
cost = {
    "cpu_seconds": time.process_time() - start,
    "peak_bytes": peak_bytes() - IMPORTS_BYTES,
}
model.save_pretrained(job["output"])
tokenizer.save_pretrained(job["output"])
print(json.dumps(cost))
