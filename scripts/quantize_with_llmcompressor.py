"""One quantization or pruning by llm-compressor, for compare_peer.py; runs in llm-compressor's own environment.

Takes one job as JSON on the command line, prints what it cost as JSON in the last line of standard output.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def peak_bytes() -> int:
    """This program's largest resident memory so far; getrusage would count that of whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


IMPORTS_BYTES = peak_bytes()

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
windows = json.loads(Path(job["windows"]).read_text(encoding="utf-8"))
dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
if "pattern" in job:
    pruner = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job["method"]]
    kept, _, of = job["pattern"].partition(":")
    shape = {"sparsity": 1 - int(kept) / int(of), "mask_structure": job["pattern"]} if of else {"sparsity": float(kept)}
    modifier, pipeline = pruner(targets=["Linear"], ignore=["re:.*lm_head"], **shape), "sequential"
else:
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["symmetric"],
        "strategy": "group",
        "group_size": job["group_size"],
    }
    quantizer, pipeline = {
        "gptq": (GPTQModifier, "sequential"),
        "rtn": (QuantizationModifier, "datafree"),
    }[job["method"]]
    modifier = quantizer(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])

start = time.process_time()
oneshot(
    model=model,
    dataset=dataset,
    recipe=modifier,
    max_seq_length=len(windows[0]),
    num_calibration_samples=len(windows),
    pipeline=pipeline,
)
cost = {
    "cpu_seconds": time.process_time() - start,
    "peak_bytes": peak_bytes() - IMPORTS_BYTES,
}
model.save_pretrained(job["output"], save_compressed=True)
AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["output"])
print(json.dumps(cost))
