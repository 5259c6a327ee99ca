"""One quantization by GPTQModel, for compare_peer.py; runs in GPTQModel's own environment.

Takes one job as JSON on the command line, prints what it cost as JSON in the last line of standard output. The folder
holds the weights that GPTQModel computes with, rounded but not packed: any loader reads them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def peak_bytes() -> int:
    """This program's largest resident memory so far; getrusage would count that of whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


IMPORTS_BYTES = peak_bytes()

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
windows = json.loads(Path(job["windows"]).read_text(encoding="utf-8"))
config = QuantizeConfig(
    bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], device="cpu", offload_to_disk=False
)
model = GPTQModel.load(job["model"], config)
calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]

start = time.process_time()
model.quantize(calibration, batch_size=4, backend=BACKEND.TORCH)
cost = {
    "cpu_seconds": time.process_time() - start,
    "peak_bytes": peak_bytes() - IMPORTS_BYTES,
}
plain = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
for name, module in model.model.named_modules():
    if hasattr(module, "dequantize_weight"):
        # Stored [in, out]. Zero points of GPTQ's first format are stored less one, which this does not undo.
        weight = module.dequantize_weight().float() - module.scales[module.g_idx.long()].float()
        plain.get_submodule(name).weight.data.copy_(weight.T)
plain.save_pretrained(job["output"])
AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["output"])
print(json.dumps(cost))
