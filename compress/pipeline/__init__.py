"""The main job: a recipe and a model in, a verified smaller checkpoint out.

    plan      what will happen, from headers alone
    texts     what to calibrate on, to train on, to be scored on
    search    what calibration has to find before all else: a shape within a budget
    segments  stages that change the model's shape or train it, each a run from one ordinary folder to the next
    walk      block by block: observe, transform, quantize, propagate, write the final shard
    finish    the tensors outside the blocks, config, tokenizer, recipe
    verify    reload the files from disk, and compare with what the walk computed
    convert   the same codes in the further formats that the recipe asks for, beside the folder
    score     the reloaded checkpoint against the original on text that calibration has not seen
    report    report.json, report.html, README.md; then the folder appears under its name

Every block is a resume point. Nothing is visible under the output's name before everything has been verified.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import report as reporting
from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.manifest import Manifest, run_key
from compress.errors import ModelError, OutputError
from compress.models.headers import read_folder
from compress.models.store import compute_dtype, device_named, local_folder
from compress.pipeline.convert import convert_also
from compress.pipeline.job import Job
from compress.pipeline.search import await_shape, find_shape, suppose_shape
from compress.pipeline.segments import check, complete, follow, is_companion
from compress.pipeline.texts import Texts
from compress.plan import Plan, exports
from compress.recipe import Recipe, dump, load, overridden
from compress.report import card
from compress.scoring import Progress
from compress.stage import Stage


def run(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    output: str | Path | None = None,
    calibration: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model by a recipe and return the report, as it stands in report.json.

    `recipe`: a file, the name of a shipped one, or a Recipe. `model`: a folder or hub id. `calibration`: a file or
    dataset name that replaces the recipe's. Raises RequestError before anything is written, RunError afterwards:
    then finished blocks are kept, and the same call with `resume=True` goes on.

    Under `accelerate launch` or `torchrun` every process makes this call. The first does the work, the others train
    with it, which is all they do; they return an empty report.
    """
    plan = prepare(recipe, model=model, calibration=calibration, overrides=overrides)
    target = output or plan.recipe.output
    if target is None:
        raise OutputError("no output folder: give --output DIR, or 'output' in the recipe")
    folder = OutputFolder(Path(target), len(plan.shards))
    source = plan.original.path.resolve()
    if folder.final == source or folder.final in source.parents or source in folder.final.parents:
        raise OutputError(f"{target}: is the model's own folder, or lies inside or around it. Choose another --output")
    companion = is_companion()
    if not companion:
        folder.check(resume=resume, overwrite=overwrite)
        exports.check(plan.recipe, folder.final, source, resume=resume, overwrite=overwrite)
    device = device_named(device)
    if plan.original.truncated:
        raise ModelError("; ".join(plan.original.truncated))
    tell, started = progress or (lambda *_: None), time.monotonic()
    tell("calibrate", 0.0, "reading text")
    texts = Texts.read(plan)
    if plan.recipe.calibrated and len(texts.windows.tokens) < plan.windows:
        plan = plan.with_windows(len(texts.windows.tokens))
    check(plan, texts, device)
    if companion:
        follow(await_shape(plan, folder.scratch), texts, folder.scratch)
        return {}
    dtype = compute_dtype(plan.layers[0].dtype, plan.recipe.calibration.dtype, device)
    key = run_key(f"{dump(plan.asked or plan.recipe)}{dtype}", plan.original, texts.windows.hash)
    manifest = Manifest.begin(folder, key, len(plan.recipe.stages), resume=resume and folder.unfinished)
    plan = find_shape(plan, texts, folder, manifest, device, tell)
    plan = complete(plan, texts, folder.scratch, manifest, device, tell)
    job = Job.create(plan, folder, texts, manifest, device, tell)
    job.started = started
    job.walk()
    job.finish()
    job.verify()
    convert_also(job.plan.recipe, folder, texts.windows.tokens if plan.calibrated else None, manifest, tell)
    report = reporting.finite(job.report())
    reporting.write(report, folder.partial)
    original = card.read(plan.original.path)
    card.write(report, folder.partial, original)
    for export in report["exports"]:
        if (place := Path(export["output"])).is_dir():
            card.write(report, place, original, export["format"])
    folder.publish()
    return report


def prepare(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    calibration: str | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan of a run: nothing is written, and no weight is read."""
    resolved = overridden(recipe, overrides) if isinstance(recipe, Recipe) else load(recipe, overrides)
    if calibration:
        resolved = replace(resolved, calibration=replace(resolved.calibration, dataset=calibration))
    name = model or resolved.model
    if name is None:
        raise ModelError("no model: give --model FOLDER_OR_ID, or 'model' in the recipe")
    return suppose_shape(resolved, read_folder(local_folder(name)))


@dataclass(frozen=True)
class Pipeline:
    """Stages composed in code instead of YAML: `Pipeline([AWQ(), RTN(scheme="w4a16")]).run(model=…, output=…)`."""

    stages: Sequence[Stage]
    name: str = "pipeline"

    def run(self, **options: Any) -> dict[str, Any]:
        """`compress.run` with these stages; same options, same report."""
        return run(Recipe(name=self.name, stages=tuple(self.stages)), **options)
