"""The model card: README.md of a folder, as the Hugging Face hub shows it, from what report.json says.

A front matter of YAML for the hub, then what was measured, how to load the folder, and how it was made. It is for
readers elsewhere: of a path on this machine it has the last part. What the original's card says of licence and language
goes into the front matter, and its text stands at the end as it was.

A folder in a further format has the same codes, so the scores are its own as well, unless layers were quantized anew.

Format: https://huggingface.co/docs/hub/model-cards, as of 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from compress.draft import Dumper
from compress.errors import writing
from compress.plan.target import READS
from compress.report.words import SCORES, Report, alarms, layers, model_name, texts, verified
from compress.tables import size

NAME = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")
"""Keys of the original's front matter that hold for what has been made of it."""
ORIGINAL = "## The original's card"
PACKAGES = {
    "compressed-tensors": "compressed-tensors", "gptq": "optimum and gptqmodel", "gptq_v2": "optimum and gptqmodel",
    "awq": "gptqmodel", "bitsandbytes": "bitsandbytes", "torchao": "torchao",
}  # fmt: skip
"""What transformers needs for a format."""
GRAPHS = {
    "onnx": ("onnx", 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")'),
    "onnx-a8": ("onnx", 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")'),
    "openvino": ("openvino", 'model = openvino.Core().compile_model("FOLDER/openvino_model.xml")'),
}
"""Format that transformers does not load → library, and what opens it."""
SCHEME = re.compile(r"(?:w|nf|(?:nv|mx)?fp)(\d).*")
"""The name of a grid, as of w4a16, fp8 or nf4, and its bits; what pruning did is called otherwise."""


def write(report: Report, folder: Path, original: str = "", form: str | None = None) -> None:
    with writing(folder):
        (folder / NAME).write_text(card(report, form, original), encoding="utf-8")


def read(folder: Path) -> str:
    """The card of a model's folder; empty where it has none."""
    file = folder / NAME
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def card(report: Report, form: str | None = None, original: str = "") -> str:
    """The card of a run's folder, or of its conversion to the format `form`. `original`: the card of the model."""
    recipe = yaml.safe_load(report["recipe"])
    stored = form or recipe["checkpoint"]["format"]
    export = next((each for each in report.get("exports") or () if each["format"] == form), None)
    inherited, text = _parts(original)
    head = _front(report, recipe, stored) | {key: inherited[key] for key in INHERITED if key in inherited}
    sections = [
        f"# {_plain(model_name(report['model']))}, {_plain(report['recipe_name'])}",
        _summary(report, stored, export),
        *_scores(report, export),
        "## Use",
        *_uses(report, stored, own=form is None),
        "## How it was made",
        *_making(report, recipe),
        *([ORIGINAL, text] if text else []),
    ]
    return f"{_yaml(head)}\n" + "\n\n".join(sections) + "\n"


def original_of(text: str) -> str:
    """The original's card, of a card that has been made of it."""
    front, body = _parts(text)
    return _yaml(front) + body.partition(f"{ORIGINAL}\n\n")[2]


def _front(report: Report, recipe: Mapping[str, Any], stored: str) -> dict[str, Any]:
    schemes = {layer["scheme"]: match[1] for _, layer in layers(report) if (match := SCHEME.fullmatch(layer["scheme"]))}
    stages = [next(iter(stage)) for stage in recipe["stages"]]
    bits = [f"{each}-bit" for each in schemes.values()]
    tags = ["netsuke", *([] if stored == "dense" else [stored]), *stages, *schemes, *bits]
    return {
        "base_model": model_name(report["model"]),
        **({"base_model_relation": "quantized"} if schemes else {}),
        "library_name": GRAPHS.get(stored, ("transformers",))[0],
        "tags": list(dict.fromkeys(tags)),
    }


def _summary(report: Report, stored: str, export: Report | None) -> str:
    before, bits = report["bytes_before"], report.get("bits_per_weight")
    if export is None:
        told = f", {bits:.2f} bits per weight in the quantized layers, scales included" if bits else ""
        return f"Made by netsuke: {size(before)} → {size(report['bytes_after'])}{told}. Format: {stored}."
    anew = export.get("requantized")
    codes = f"{anew} layers were quantized anew for it" if anew else "the codes are those that were scored"
    return f"Made by netsuke: {size(before)} → {size(export['bytes'])}. Format: {stored}; {codes}."


def _scores(report: Report, export: Report | None) -> Iterator[str]:
    found, reason = texts(report), report.get("evaluation_note")
    if export and export.get("requantized"):
        yield "## Scores\n\nNot scored in this format."
    elif found:
        names = ["text", *(name for name, _ in SCORES.values())]
        rows = [
            [_code(text["name"]), *(_number(text.get(key), form) for key, (_, form) in SCORES.items())]
            for text in found
        ]
        told = "Read back from disk and compared with the original on the same tokens, in float32."
        yield f"## Scores\n\n{told}\n\n{_table(names, rows)}"
    elif reason:
        yield f"## Scores\n\nNot scored: {_plain(reason)}."
    if said := alarms(report):
        yield "What did not go as asked:\n\n" + "\n".join(f"- {_plain(each)}" for each in said)


def _uses(report: Report, stored: str, *, own: bool) -> Iterator[str]:
    """How to load the folder, for each program that is known to read it. `own`: whether it is that of the run."""
    if stored in GRAPHS:
        yield _fence(GRAPHS[stored][1], "python")
        return
    engines = report.get("engines") or [] if own else [engine for engine in READS if stored in READS[engine]]
    if "transformers" in engines:
        package = PACKAGES.get(stored)
        instead = "" if stored == "bitsandbytes" else ", or after `import compress`"  # `compress.runtime.plugin`
        yield f"transformers, with {package} installed{instead}:" if package else "transformers:"
        kind = "AutoModelForCausalLM" if report.get("generates", True) else "AutoModel"
        load = f'model = {kind}.from_pretrained("FOLDER")'
        yield _fence(f"from transformers import {kind}\n\n{load}", "python")
    if "vllm" in engines and report.get("generates", True):
        yield f"vLLM:\n\n{_fence('vllm serve FOLDER')}"
    yield "netsuke:"
    yield _fence('import compress\n\nmodel, tokenizer = compress.load("FOLDER")', "python")


def _making(report: Report, recipe: Mapping[str, Any]) -> Iterator[str]:
    yield "\n".join(f"- {name}: {value}" for name, value in _facts(report) if value)
    told = _elsewhere({key: value for key, value in recipe.items() if key not in ("model", "output")})
    yield _fence(yaml.dump(told, Dumper=Dumper, sort_keys=False, allow_unicode=True).strip(), "yaml")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    if calibration := report.get("calibration"):
        windows = f"{calibration['tokens']:,} tokens in windows of {calibration['sequence_length']:,}"
        yield "calibration", f"{_code(_elsewhere(calibration['dataset']))}, {windows}"
        yield "hash of these tokens", _code(calibration["hash"])
    yield "verified", verified(report)
    yield "notes", _plain("; ".join(report.get("notes") or ()))
    yield "versions", _plain(", ".join(f"{name} {each}" for name, each in (report.get("versions") or {}).items()))


def _parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; of a front matter that is no YAML, nothing."""
    match = re.match(r"\ufeff?---[ \t]*\n(.*?\n)?---[ \t]*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    if not match:
        return {}, text.strip()
    try:
        front = yaml.safe_load(match[1] or "")
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}, text.replace("\r\n", "\n")[match.end() :].strip()


def _yaml(front: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n"


def _elsewhere(value: Any) -> Any:
    """Plain data in which a path on this machine is its last part."""
    if isinstance(value, dict):
        return {key: _elsewhere(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_elsewhere(each) for each in value]
    if isinstance(value, str) and re.match(r"[/~.\\]|\w:[/\\]", value):
        return PurePath(value.replace("\\", "/")).name
    return value


def _plain(text: str) -> str:
    """Text on one line in which Markdown and HTML see none of their signs."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    quoted = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{quoted}`"


def _fence(text: str, language: str = "") -> str:
    """A block of code, whatever rows of backticks are in it."""
    ticks = "`" * max([3, *(len(row) + 1 for row in re.findall("`+", text))])
    return f"{ticks}{language}\n{text}\n{ticks}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *rows])


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)
