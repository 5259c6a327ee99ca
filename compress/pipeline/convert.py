"""Another runtime's format for the same quantized values: nothing is rounded again, or it is refused.

A folder is read layer by layer, each layer's codes, scales and zero points are written in the other format, and what
lies on disk is read back and compared, bit for bit, before the folder appears under its name.

GGUF is one file with types of its own. Codes go into it as they are where a type holds them; other layers, and those of
an ordinary folder, are quantized anew, and the result says how many were (`compress.checkpoint.gguf`).

ONNX and OpenVINO hold the operations of the model as well (`compress.checkpoint.onnx_graph`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.checkpoint import FORMATS, Format, format_for, onnx_model
from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.gguf import all_held, export, kind_named
from compress.checkpoint.gguf_file import PLAIN
from compress.checkpoint.graphs import GRAPHS
from compress.checkpoint.layouts import Entries
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.weights import QuantizedWeights, open_weights
from compress.errors import ModelError, NetsukeError, OutputError, RequestError
from compress.models.headers import Folder, read_folder, read_json
from compress.models.selection import did_you_mean
from compress.models.store import DTYPES, empty_module, load_tokenizer, local_folder
from compress.pipeline.fitted import fit, fitted, text_windows
from compress.plan import exports
from compress.recipe import CheckpointOptions, Recipe
from compress.report import card
from compress.scoring import Progress

Text = Callable[[Folder, Any], Int[Tensor, "windows length"]]
"""From a model's folder and tokenizer to the windows that layers are fitted to."""
WEIGHTS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.xml", "*.bin")


def convert(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    calibration: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a quantized folder in the format `to`, and say what was written.

    `calibration`: a text, local or on the hub, that layers are fitted to where GGUF has them quantized anew.

    Raises RequestError before anything is written where the folder or the format cannot be that, with the reason.
    """
    if to.startswith("gguf-"):
        text = partial(text_windows, dataset=calibration) if calibration else None
        return _gguf(source, to, Path(output), overwrite, text, progress or (lambda *_: None))
    if calibration:
        raise RequestError(f"--calibration {calibration}: {to} takes the codes as they are. Leave it out")
    if to not in FORMATS and to not in GRAPHS:
        known = [*FORMATS, *GRAPHS]
        raise RequestError(
            f"--to {to}: there is no such format.{did_you_mean(to, known)} There are {', '.join(known)} and "
            "gguf-q4_0, gguf-q4_k …"
        )
    folder = read_folder(local_folder(str(source)))
    if not folder.config.get("quantization_config"):
        raise ModelError(f"{source}: is not quantized, so there is nothing to convert. Use `netsuke run`")
    weights = QuantizedWeights(folder)
    form = None if to in GRAPHS else format_for(CheckpointOptions(format=to))
    problems = _problems(weights, form) if form else _beside(weights) or onnx_model.problems(weights)
    if problems:
        raise ModelError(problems)
    target = OutputFolder(Path(output), len(folder.files))
    if target.final == folder.path.resolve():
        raise OutputError(f"{output}: is the folder itself. Choose another --output")
    target.check(resume=False, overwrite=overwrite)
    Manifest.begin(target, "", 0, resume=False)  # so that --overwrite may drop what a conversion that was killed left
    try:
        if form:
            names, total = _write(weights, form, target)
            target.write_rest(folder, _config(weights, form), names, total)
        else:
            GRAPHS[to](weights, target.partial)
            target.copy_side_files(folder)
            target.write_json("config.json", _without_quantization(folder.config))
    except NetsukeError:
        shutil.rmtree(target.partial)
        raise
    total = sum(file.stat().st_size for pattern in WEIGHTS for file in target.partial.glob(pattern))
    file = folder.path / "report.json"
    report = read_json(file) if file.exists() else {}
    if "recipe_name" in report:  # a run of ours
        report |= {"exports": [{"format": to, "bytes": total}]}
        card.write(report, target.partial, card.original_of(card.read(folder.path)), to)
    target.publish()
    return {
        "model": str(source),
        "output": str(target.final),
        "format": to,
        "layers": len(weights.schemes),
        "bytes_before": folder.bytes,
        "bytes_after": total,
    }


def convert_also(
    recipe: Recipe,
    folder: OutputFolder,
    windows: Int[Tensor, "windows length"] | None,
    manifest: Manifest,
    tell: Progress,
) -> None:
    """Convert a finished folder, before it appears, to the further formats of its recipe; the manifest has the results.

    `windows`: of the text that the run was calibrated on, if it was, which layers that GGUF has anew are fitted to.
    What an interrupted run has left is made again. A format that cannot be written after all costs the others nothing.
    """
    done = manifest.facts.setdefault("exports", {})
    for index, name in enumerate(recipe.checkpoint.also):
        place = exports.place(folder.final, name)
        if name in done and place.exists():
            continue
        tell("convert", index / len(recipe.checkpoint.also), f"to {name}")
        told: dict[str, Any] = {"format": name, "output": str(place)}
        try:
            if name.startswith("gguf-"):
                text = None if windows is None or kind_named(name) in PLAIN else (lambda *_: windows)
                found = _gguf(folder.partial, name, place, True, text, tell)
            else:
                found = convert(folder.partial, name, place, overwrite=True)
            told |= {"bytes": found["bytes_after"], "exact": found.get("exact", found["layers"])}
            told |= {"requantized": found.get("requantized", 0), "types": found.get("types", {})}
        except NetsukeError as error:
            told["error"] = str(error).replace(str(folder.partial), str(folder.final))
        done[name] = told
        manifest.save()


def _gguf(
    source: str | Path,
    to: str,
    output: Path,
    overwrite: bool,
    text: Text | None,
    tell: Progress,
) -> dict[str, Any]:
    """A folder, quantized or not, as one file for llama.cpp. `output`: the file, or a folder for `model.gguf`.

    `text` reads what layers are fitted to.
    """
    try:
        kind = kind_named(to)
    except ValueError as error:
        raise RequestError(f"--to {error}") from error
    if text and kind in PLAIN:
        raise RequestError(f"--calibration: {to} quantizes nothing. Leave it out")
    path = local_folder(str(source))
    weights = open_weights(path)
    if isinstance(weights, QuantizedWeights) and (problems := _beside(weights)):
        raise ModelError(problems)
    file = output if output.suffix == ".gguf" else output / "model.gguf"
    if file.exists() and not overwrite:
        raise OutputError(f"{file}: exists already. Choose another --output, or give --overwrite")
    tokenizer = load_tokenizer(path)
    windows = text(weights.folder, tokenizer) if text else None
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        files: Mapping[str, Path] = {}
        if windows is not None and not all_held(weights, kind):
            files = fit(path, kind, windows, Path(scratch), tell)
        written = export(weights, kind, tokenizer, file, lambda layer, found: fitted(files, layer, found), tell)
    return {
        "model": str(source),
        "output": str(file),
        "format": to,
        "layers": written.exact + written.requantized,
        "exact": written.exact,
        "requantized": written.requantized,
        "types": written.kinds,
        "fitted": bool(files),
        "bytes_before": weights.folder.bytes,
        "bytes_after": file.stat().st_size,
    }


def _beside(weights: QuantizedWeights) -> list[str]:
    """What belongs to the codes and has a place beside them in compressed-tensors only."""
    where, quantization = weights.folder.path, weights.folder.config["quantization_config"]
    if weights.online:
        name = next(iter(weights.online))
        return [f"{where}: {name} has inputs that are rotated while it runs, which only compressed-tensors can say"]
    if weights.adapter.products:
        return [f"{where}: has a LoRA adapter beside its codes, which belongs to them as compressed-tensors has them"]
    if quantization.get("kv_cache_scheme"):
        return [f"{where}: has calibrated scales of its KV cache, which only compressed-tensors can hold"]
    return []


def _problems(weights: QuantizedWeights, form: Format) -> list[str]:
    """Why these layers cannot be in that format, a sentence each."""
    if beside := _beside(weights):
        return beside
    where = weights.folder.path
    kind = "Conv1D" if weights.anatomy.transposed else "Linear"
    layers = {
        reason.removeprefix(name): reason
        for name, scheme in reversed(weights.schemes.items())
        for reason in form.problems(name, kind, _shape(weights, name), scheme)
    }
    found = [*layers.values()]
    schemes = set(weights.schemes.values())
    if form.packs and form.name != "compressed-tensors" and len(schemes) > 1:
        told = ", ".join(sorted(scheme.name for scheme in schemes))
        found.append(f"{where}: has layers of several schemes ({told}), and {form.name} holds one in a folder")
    return found


def _shape(weights: QuantizedWeights, layer: str) -> tuple[int, int]:
    rows, columns = weights.shape(f"{layer}.weight")
    return rows, columns


def _write(weights: QuantizedWeights, form: Format, target: OutputFolder) -> tuple[dict[str, str], int]:
    """Every file of the folder in the other format; tensor name → file, and the bytes of all tensors."""
    owner = {f"{layer}.": layer for layer in weights.schemes}
    target.metadata = form.metadata(_entries(weights, form), weights.schemes.values(), _dtype(weights))
    names: dict[str, str] = {}
    total = 0
    for index, file in enumerate(weights.folder.files):
        held: dict[str, Tensor] = {}
        layers: set[str] = set()
        for name, header in weights.tensors.items():
            if header.file != file:
                continue
            layer = owner.get(f"{name.rpartition('.')[0]}.")
            if layer is None or name == f"{layer}.bias":
                held[header.name] = weights.read(name)
            elif layer not in layers and layer not in names:
                layers.add(layer)
                held |= _encoded(weights, form, layer)
        target.write_shard(index, held)
        _read_back(weights, form, target.partial / target.shard_name(index), layers)
        names |= {name: target.shard_name(index) for name in held}
        total += sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    return names, total


def _entries(weights: QuantizedWeights, form: Format) -> Entries:
    """Tensor name → (dtype, shape) of the folder in the other format."""
    entries: Entries = {}
    for name, header in weights.tensors.items():
        layer = name.rpartition(".")[0]
        if layer not in weights.schemes or name == f"{layer}.bias":
            entries[header.name] = header.dtype, header.shape
        else:
            entries |= form.layout(layer, _shape(weights, layer), weights.schemes[layer], _dtype(weights))
    return entries


def _encoded(weights: QuantizedWeights, form: Format, layer: str) -> dict[str, Tensor]:
    tensor, inputs = weights.quantized(layer), weights.schemes[layer].inputs
    try:
        return form.encode(layer, tensor, inputs, weights.input_scale(layer))
    except ValueError as error:
        raise ModelError(str(error)) from error


def _read_back(weights: QuantizedWeights, form: Format, file: Path, layers: set[str]) -> None:
    """Raises VerificationError unless the file gives back the very numbers, on their grids."""
    if not form.packs:
        return
    stored = load_file(file)
    for layer in layers:
        part = {name: tensor for name, tensor in stored.items() if name.startswith(f"{layer}.")}
        decoded = form.decode(layer, part, weights.schemes[layer].weights)
        onnx_model.check_same(layer, weights.quantized(layer), decoded, file)


def _config(weights: QuantizedWeights, form: Format) -> dict[str, Any]:
    """The folder's config.json with the other format's words in it."""
    config = _without_quantization(weights.folder.config)
    module = empty_module(weights.folder)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    kept = [name for name in linear if name not in weights.schemes]
    quantization = form.quantization_config(weights.schemes, kept, weights.online, _dtype(weights))
    return config | ({"quantization_config": quantization} if quantization else {})


def _dtype(weights: QuantizedWeights) -> str:
    """The type of what is not quantized, which is that of the original weights."""
    kept = (header for name, header in weights.tensors.items() if name.rpartition(".")[0] not in weights.schemes)
    return next(header.dtype for header in kept if DTYPES[header.dtype].is_floating_point)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}
