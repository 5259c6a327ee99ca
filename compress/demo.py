"""A demonstration that needs no network: a small language model, compressed four ways, and what each way cost.

The text is what every Python brings along: the documentation strings of its standard library, read from the source
files without importing one. A token is a byte. The model is a Llama of 0.8 million parameters, trained by Muon (Jordan
et al. 2024: momentum, orthogonalised) on its matrices and by AdamW on the rest, for a fixed number of steps, about one
minute on two cores. It learns the manners of documentation, not its matter, and that is enough to measure what rounding
its weights changes. Documents that training has not seen are kept for calibration and, apart from those, for the test.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.errors import DataError, OutputError
from compress.scoring import Progress

MODEL = "docstring-llama"
RECIPES = ("w8a16-rtn", "w4a16-gptq", "w4a16-awq", "w3a16-gptq")
PROMPT = "Return the "
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
BATCH = 8
STEPS = 400
WINDOWS = 128
"""Of text that is scored, and twice as many as calibration sees."""
WARMUP_STEPS = 20
HELD_OUT_BYTES = 64_000
"""Size of each of the two texts that training does not see."""
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders under the standard library's that hold somebody else's code, or tests."""


def run_demo(
    folder: Path, progress: Progress | None = None, *, steps: int = STEPS, windows: int = WINDOWS
) -> list[dict[str, Any]]:
    """Train, compress by every recipe, and return a row of measurements for the original and each result.

    Raises OutputError where the folder is in use, DataError where this Python has no sources.
    """
    from compress import pipeline

    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: is not empty. Give another folder, or remove it")
    tell = progress or (lambda *_: None)
    build_model(folder, steps=steps, progress=_share(tell, 0.0, 0.8))
    overrides = [
        f"calibration.samples={windows // 2}",
        f"calibration.sequence_length={CONTEXT}",
        f"evaluation.text={json.dumps([str(folder / 'test.jsonl')])}",
        f"evaluation.samples={windows}",
    ]
    reports = {}
    for index, recipe in enumerate(RECIPES):
        reports[recipe] = pipeline.run(
            recipe,
            model=str(folder / MODEL),
            output=folder / recipe,
            calibration=str(folder / "calibration.jsonl"),
            overrides=overrides,
            progress=_share(tell, 0.8 + 0.05 * index, 0.85 + 0.05 * index, recipe),
        )
    return [_original(folder, next(iter(reports.values()))), *(_row(folder, *each) for each in reports.items())]


def build_model(folder: Path, *, steps: int = STEPS, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Train the model; write `docstring-llama/`, `calibration.jsonl` and `test.jsonl` into `folder`.

    Returns what it is: `parameters`, `bytes_of_text`, `steps`, and `loss` in nats per byte, the mean of the last
    tenth of the steps.
    """
    from transformers import LlamaForCausalLM

    tell = progress or (lambda *_: None)
    tell("train", 0.0, "reading documentation strings")
    training, calibration, test = split(docstrings(Path(sysconfig.get_path("stdlib"))), seed)
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer))
    losses = []
    for step, loss in enumerate(_train(model, _stream(training, tokenizer), steps, seed), start=1):
        losses.append(loss)
        tell("train", step / steps, f"step {step} of {steps}, {loss:.2f} nats per byte")
    _save(model, tokenizer, folder / MODEL)
    _write_jsonl(folder / "calibration.jsonl", calibration)
    _write_jsonl(folder / "test.jsonl", test)
    last = losses[-max(1, steps // 10) :]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_of_text": sum(len(text.encode()) for text in training),
        "steps": steps,
        "loss": sum(last) / len(last),
    }


# ---- text ------------------------------------------------------------------------------------------------


def docstrings(root: Path) -> list[str]:
    """The documentation strings of all Python files under `root`, each once, in the order of their paths."""
    found: dict[str, None] = {}
    for path in _sources(root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[ast.get_docstring(node) or ""] = None
    found.pop("", None)
    return list(found)


def split(documents: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Shuffled documents for training, calibration and test; no document is in two of them."""
    rest = random.Random(seed).sample(documents, len(documents))
    held_out = []
    for _ in range(2):
        taken, size = [], 0
        while rest and size < HELD_OUT_BYTES:
            taken.append(rest.pop())
            size += len(taken[-1].encode())
        held_out.append(taken)
    if sum(len(text.encode()) for text in rest) < HELD_OUT_BYTES:
        raise DataError(
            f"{len(documents)} documentation strings are too few to train on and to hold {2 * HELD_OUT_BYTES:,} bytes "
            "back. Use a Python that comes with the sources of its standard library"
        )
    return rest, held_out[0], held_out[1]


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes and the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - NOT_LIBRARY)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _stream(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """The tokens of all documents in one row, each closed by the end-of-text token."""
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(list(documents))["input_ids"] for token in (*ids, end)])


def _write_jsonl(path: Path, documents: Sequence[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    path.write_text(lines, encoding="utf-8")


# ---- training --------------------------------------------------------------------------------------------


def _config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _train(model: Any, tokens: Tensor, steps: int, seed: int) -> Iterator[float]:
    """Train in place; yields each step's loss."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        """Up over the warm-up, level, then down over the last 60 % of the steps."""
        return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (0.6 * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for batch in _batches(tokens, steps, seed):
        logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        yield loss.item()


def _batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Windows [BATCH, CONTEXT + 1] in random order, all of them once before any comes again."""
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * BATCH // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    for step in range(steps):
        yield windows[order[step * BATCH : (step + 1) * BATCH]]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder in bfloat16, without the progress bar that `save_pretrained` shows."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


# ---- rows ------------------------------------------------------------------------------------------------


def _original(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe": "original",
        "bytes": report["bytes_before"],
        "bits_per_weight": 16.0,
        "perplexity": report["evaluation"]["texts"][0]["baseline_perplexity"],
        "kl_divergence": None,
        "sample": _sample(folder / MODEL),
        "report": None,
    }


def _row(folder: Path, recipe: str, report: dict[str, Any]) -> dict[str, Any]:
    (score,) = report["evaluation"]["texts"]
    return {
        "recipe": recipe,
        "bytes": report["bytes_after"],
        "bits_per_weight": report["bits_per_weight"],
        "perplexity": score["perplexity"],
        "kl_divergence": score["kl_divergence"],
        "sample": _sample(folder / recipe),
        "report": str(folder / recipe / "report.html"),
    }


def _sample(model: Path) -> str:
    """The prompt and the model's next 120 bytes, drawn with the same random numbers for every model."""
    from compress.runtime.generate import generate
    from compress.runtime.load import load

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return generate(*load(model), PROMPT, max_new_tokens=120, min_new_tokens=120, do_sample=True, temperature=0.6)


def _share(tell: Progress, start: float, end: float, prefix: str = "") -> Progress:
    """Progress of one part as progress of the whole."""

    def show(phase: str, done: float, words: str) -> None:
        tell(f"{prefix} {phase}".strip(), start + (end - start) * done, words)

    return show
