#!/usr/bin/env python3
"""One quantization result in the formats of many runtimes, each read by a program that is not ours.

    scripts/compare_formats.py --model DIR --calibration FILE --test FILE [--python LOADER=PYTHON …] [--only FORMAT …]

The model is quantized twice by GPTQ, to 4 bits in groups of 32, symmetric and asymmetric. Every format that holds such
codes is written by `netsuke convert`; its loader computes the logits of the same tokens in float32, in an environment
of its own where one is named; and the table says how far they are from ours, ‖a - b‖ / ‖b‖ and the largest difference
relative to the largest logit. A loader that is not installed has a row that says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """
calibration: {{dataset: {calibration}, samples: 64, sequence_length: 256}}
stages: [gptq: {{scheme: w4a16, group_size: 32, symmetric: {symmetric}, ignore: [lm_head]}}]
checkpoint: {{format: compressed-tensors}}
evaluation: {{samples: 1}}
"""
ROWS = [
    ("compressed-tensors", "symmetric", "transformers"),
    ("compressed-tensors", "asymmetric", "transformers"),
    ("gptq", "symmetric", "description"),
    ("gptq_v2", "symmetric", "description"),
    ("gptq_v2", "asymmetric", "description"),
    ("awq", "symmetric", "description"),
    ("awq", "asymmetric", "description"),
    ("gguf-q4_0", "symmetric", "gguf"),
    ("gguf-q4_1", "asymmetric", "gguf"),
    ("gguf-q4_0", "symmetric", "llama.cpp"),
    ("gguf-q4_1", "asymmetric", "llama.cpp"),
    ("gguf-q4_0", "symmetric", "llama.cpp, decoded"),
    ("gguf-q4_1", "asymmetric", "llama.cpp, decoded"),
    ("onnx", "symmetric", "onnxruntime"),
    ("onnx", "asymmetric", "onnxruntime"),
    ("openvino", "symmetric", "openvino"),
    ("openvino", "asymmetric", "openvino"),
]
"""Format, kind of codes, loader."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="LOADER=PYTHON")
    parser.add_argument("--only", nargs="+", metavar="FORMAT")
    options = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in options.python)
    with tempfile.TemporaryDirectory() as scratch:
        print("| format | codes | loader | version | relative difference | largest |")
        print("|---|---|---|---|--:|--:|")
        for row in compared(options, pythons, Path(scratch)):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


def compared(options: argparse.Namespace, pythons: dict[str, str], scratch: Path) -> Iterator[tuple[str, ...]]:
    tokens = scratch / "tokens.npy"
    np.save(tokens, windows(options.model, options.test))
    for kind in ("symmetric", "asymmetric"):
        recipe = scratch / f"{kind}.yaml"
        recipe.write_text(RECIPE.format(calibration=options.calibration, symmetric=json.dumps(kind == "symmetric")))
        netsuke("run", recipe, "--model", options.model, "--output", scratch / kind)
        np.save(scratch / f"{kind}.npy", logits_of_ours(scratch / kind, tokens))
    for form, kind, loader in ROWS:
        if options.only and form not in options.only:
            continue
        folder = scratch / kind
        if form != "compressed-tensors":
            folder = scratch / f"{kind}-{form}"
            if not folder.exists():
                netsuke("convert", scratch / kind, "--to", form, "--output", folder)
        found = scratch / "logits.npy"
        command = [pythons.get(loader, sys.executable), __file__, "--load", loader, folder, tokens, found]
        result = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
        if result.returncode:
            yield form, kind, loader, "", "not run: " + (result.stderr.strip().splitlines() or ["no reason"])[-1], ""
            continue
        ours, theirs = np.load(scratch / f"{kind}.npy").astype(np.float64), np.load(found).astype(np.float64)
        relative = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
        largest = np.abs(theirs - ours).max() / np.abs(ours).max()
        yield form, kind, loader, result.stdout.strip().splitlines()[-1], f"{relative:.1e}", f"{largest:.1e}"


def netsuke(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "compress.cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def windows(model: Path, test: Path) -> np.ndarray:
    from compress.models.store import load_tokenizer
    from eval.texts import prepended_bos, read_documents, tokenize
    from eval.texts import windows as cut

    tokenizer = load_tokenizer(model)
    return cut(tokenize(read_documents(test), tokenizer), 128, prepended_bos(tokenizer))[:4].numpy()


def logits_of_ours(folder: Path, tokens: Path) -> np.ndarray:
    import torch

    from compress.scoring.opened import opened

    with opened(folder) as model:
        return model(torch.from_numpy(np.load(tokens))).float().numpy()


# ---- loaders: each knows a folder and token ids, and nothing of ours -----------------------------------------------


def load() -> int:
    loader, folder, tokens, out = sys.argv[2:]
    version, logits = LOADERS[loader](Path(folder), np.load(tokens))
    np.save(out, logits.astype(np.float32))
    print(version)
    return 0


def versions(*names: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def by_transformers(folder: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def compressed_tensors(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    from transformers import CompressedTensorsConfig

    logits = by_transformers(folder, tokens, quantization_config=CompressedTensorsConfig(run_compressed=False))
    return versions("transformers", "compressed-tensors"), logits


def gguf(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    return versions("transformers", "gguf"), by_transformers(folder, tokens, gguf_file="model.gguf")


def description(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    """GPTQ and AWQ as their layouts are described, decoded with NumPy into an ordinary model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    how = config.pop("quantization_config")
    bits, stored = how["bits"], {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)

    def codes(words: np.ndarray, count: int) -> np.ndarray:
        bit = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
        stream = bit.reshape(len(words), -1)[:, : count * bits].reshape(len(words), count, bits)
        return (stream * (1 << np.arange(bits))).sum(-1)

    state = {name: tensor.float() for name, tensor in stored.items() if tensor.is_floating_point()}
    for layer in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        words, zeros = (stored[f"{layer}.{name}"].numpy() for name in ("qweight", "qzeros"))
        scales = state.pop(f"{layer}.scales").numpy()
        groups, rows = scales.shape
        if how["quant_method"] == "awq":
            order = [0, 4, 1, 5, 2, 6, 3, 7]
            u, z = (codes(each, rows).reshape(len(each), -1, 8)[..., order].reshape(len(each), rows)
                    for each in (words, zeros))  # fmt: skip
            group = np.arange(len(u)) // (len(u) // groups)
        else:
            u = codes(np.ascontiguousarray(words.T), words.shape[0] * 32 // bits).T
            z = codes(zeros, rows) + (how["checkpoint_format"] == "gptq")
            group = stored[f"{layer}.g_idx"].numpy()
        state[f"{layer}.weight"] = torch.from_numpy(((u - z[group]) * scales[group]).T.astype(np.float32))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"error: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    with torch.inference_mode():
        return versions("numpy"), model(torch.from_numpy(tokens)).logits.numpy()


def by_llama_cpp(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    import torch

    from eval.llama_cpp import LlamaCpp

    model = LlamaCpp(folder / "model.gguf")
    return model.runs_on, model(torch.from_numpy(tokens)).numpy()


def by_llama_cpp_decoded(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    """The same from a file that llama.cpp itself has turned into float32, so that inputs are not rounded to 8 bits."""
    from llama_cpp_files import quantize

    with tempfile.TemporaryDirectory() as scratch:
        quantize(folder / "model.gguf", Path(scratch) / "model.gguf", "F32")
        return by_llama_cpp(Path(scratch), tokens)


def onnxruntime(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], inputs_for(session.get_inputs(), tokens))
    return versions("onnxruntime"), logits


def openvino(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    import openvino as ov

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    model = ov.Core().compile_model(next(folder.glob("*.xml")), "CPU", exact)
    inputs = {port.any_name: port for port in model.inputs}
    fed = inputs_for([Port(name, port) for name, port in inputs.items()], tokens)
    return versions("openvino"), model(fed)["logits"]


class Port:
    """An input of OpenVINO's, with the words of ONNX Runtime."""

    def __init__(self, name: str, port: Any) -> None:
        self.name = name
        self.shape = [each.get_length() if each.is_static else None for each in port.get_partial_shape()]


def inputs_for(ports: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Token ids, everything seen, positions from 0, and an empty cache."""
    rows, length = tokens.shape
    fed: dict[str, np.ndarray] = {}
    for port in ports:
        if port.name.startswith("past_key_values"):
            _, heads, _, size = port.shape
            fed[port.name] = np.zeros((rows, heads, 0, size), np.float32)
        elif port.name == "input_ids":
            fed[port.name] = tokens.astype(np.int64)
        elif port.name == "beam_idx":
            fed[port.name] = np.arange(rows, dtype=np.int32)
        elif port.name == "attention_mask":
            fed[port.name] = np.ones((rows, length), np.int64)
        elif port.name == "position_ids":
            fed[port.name] = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    return fed


LOADERS: dict[str, Callable[[Path, np.ndarray], tuple[str, np.ndarray]]] = {
    "transformers": compressed_tensors,
    "description": description,
    "gguf": gguf,
    "llama.cpp": by_llama_cpp,
    "llama.cpp, decoded": by_llama_cpp_decoded,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}

if __name__ == "__main__":
    sys.exit(load() if sys.argv[1:2] == ["--load"] else main())
