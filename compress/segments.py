"""Segments: the runs that come before the walk, of one stage each, from one ordinary folder to another.

A stage that changes the model's shape, or trains it, leaves a folder that plain transformers loads, and the next stage
begins from that folder as if a user had given it. A shaper is walked like any recipe of one stage; a trainer is handed
the folder, the original model to learn from, and text. What is finished is kept in the scratch folder of the whole run,
the newest folder only, so a run that was killed goes on with the segment it was in, where it was in it.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.manifest import Manifest, run_key
from compress.errors import NumericalError
from compress.job import Job
from compress.models.headers import Folder, canonical, read_folder
from compress.models.store import DTYPES, Weights
from compress.plan import Plan
from compress.recipe import dump
from compress.scoring import Progress
from compress.stage import Trained
from compress.texts import Texts


def complete(plan: Plan, texts: Texts, scratch: Path, manifest: Manifest, device: str, tell: Progress) -> Plan:
    """The plan of what is left to do once every segment has left its folder. `manifest`: of the whole run."""
    places = [
        scratch / "segments" / f"{index}-{segment.recipe.stages[0].name}" for index, segment in enumerate(plan.segments)
    ]
    folder = plan.original
    for index, (segment, place) in enumerate(zip(plan.segments, places, strict=True)):
        if any(later.exists() for later in places[index + 1 :]):
            continue
        if not place.exists():
            here = segment.on(folder) if index else segment
            told = _within(tell, index, len(places) + 1, here.recipe.stages[0].name)
            begun = time.monotonic()
            output = OutputFolder(place, len(here.shards))
            complete_one = _train if here.recipe.trainer else _reshape
            layers, facts = complete_one(here, plan.original, output, texts, device, told)
            manifest.layers[index] = layers
            manifest.seconds[index] += time.monotonic() - begun
            found = read_folder(output.partial)
            facts |= {"stage": here.recipe.stages[0].name, "parameters": here.parameters_after, "bytes": found.bytes}
            manifest.facts["segments"] = [*manifest.facts.get("segments", [])[:index], facts]
            manifest.save()
            output.publish()
        if index:
            shutil.rmtree(folder.path, ignore_errors=True)
        folder = read_folder(place)
    return plan.on(folder) if plan.segments else plan


def _reshape(
    plan: Plan, original: Folder, output: OutputFolder, texts: Texts, device: str, tell: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Walk the model with the stage that changes its shape."""
    key = run_key(dump(plan.recipe), plan.folder, texts.windows.hash)
    manifest = Manifest.begin(output, key, 1, resume=output.unfinished)
    job = Job.create(plan, output, texts, manifest, device, tell)
    job.walk()
    job.finish()
    job.verify()
    return manifest.layers[0], dict(manifest.facts.get(plan.recipe.stages[0].name, {}))


def _train(
    plan: Plan, original: Folder, output: OutputFolder, texts: Texts, device: str, tell: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train the model towards the original, and store what it has become in the types it was stored in."""
    output.open(resume=True)
    trained = train(plan, plan.folder, original, output.scratch / "training", texts, tell)
    weights = Weights(plan.folder)
    tied = {plan.anatomy.head: plan.anatomy.embedding}

    def stored(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value = trained.state.get(name, trained.state.get(f"{tied.get(path, path)}.{leaf}"))
        if value is None:
            return weights.read(name)
        if not value.isfinite().all():
            raise NumericalError(f"{name}: training has left numbers that are not finite. Lower the learning rate")
        return value.to(DTYPES[weights.tensors[name].dtype])

    modules = {header.name: name for name, header in canonical(plan.folder.tensors, plan.anatomy).items()}
    for index, shard in enumerate(plan.shards):
        output.write_shard(index, {name: stored(modules[name]) for name in shard})
    names = {name: output.shard_name(index) for index, shard in enumerate(plan.shards) for name in shard}
    output.write_rest(plan.folder, plan.folder.config, names, plan.tensor_bytes_after)
    return [], trained.facts


def train(plan: Plan, student: Folder, teacher: Folder, work: Path, texts: Texts, tell: Progress) -> Trained:
    """What every process of a training does alike."""
    stage = plan.recipe.trainer
    length = stage.training.sequence_length or plan.sequence_length
    windows, held_out = texts.for_training(stage.dataset, stage.training.tokens, length, plan.recipe.calibration)
    return stage.train(student.path, teacher.path, windows, held_out, work, tell)


def _within(tell: Progress, index: int, count: int, name: str) -> Progress:
    """Progress of one of several parts, as a share of the whole."""
    return lambda phase, share, words: tell(phase, (index + share) / count, f"{name}: {words}")
