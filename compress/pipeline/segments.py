"""Segments: the runs that come before the walk, of one stage each, from one ordinary folder to another.

A stage that changes the model's shape, or trains it, leaves a folder that plain transformers loads, and the next stage
begins from that folder as if a user had given it. A shaper is walked like any recipe of one stage; a trainer is handed
the folder, the original model to learn from, and text. What is finished is kept in the scratch folder of the whole run,
the newest folder only, so a run that was killed goes on with the segment it was in, where it was in it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.manifest import Manifest, run_key
from compress.distill.optimizer import optimizer_class
from compress.errors import NumericalError, RequestError
from compress.models.experts import taken_apart
from compress.models.headers import Folder, canonical, read_folder
from compress.models.store import DTYPES, Weights
from compress.pipeline.job import Job
from compress.pipeline.texts import Texts
from compress.plan import Plan
from compress.recipe import dump
from compress.scoring import Progress
from compress.stage import LEARNED, Trained

TRAINING = "training"
"""In the scratch folder of a segment that trains: its checkpoints."""


def check(plan: Plan, texts: Texts, device: str) -> None:
    """Raises RequestError, before anything is written, for what a training would only find out when its turn comes: too
    little text, or no such optimizer."""
    for segment in plan.segments:
        if stage := segment.recipe.trainer:
            length = stage.training.sequence_length or segment.sequence_length
            texts.for_training(stage.dataset, length, length, segment.recipe.calibration)
            optimizer_class(stage.training.optimizer, torch.device(device))


def complete(plan: Plan, texts: Texts, scratch: Path, manifest: Manifest, device: str, tell: Progress) -> Plan:
    """The plan of what is left to do once every segment has left its folder. `manifest`: of the whole run."""
    places = _places(plan, scratch)
    done = together(lambda: _done(places))
    folder = read_folder(places[done - 1]) if done else plan.original
    for index, (segment, place) in enumerate(zip(plan.segments[done:], places[done:], strict=True), start=done):
        here = segment.on(folder) if index else segment
        stage = here.recipe.stages[0]
        told = _within(tell, index, len(places) + 1, stage.name)
        begun = time.monotonic()
        output = OutputFolder(place, len(here.shards))
        work = _train if here.recipe.trainer else _reshape
        layers, facts = work(here, plan.original, output, texts, device, told)
        at = plan.recipe.segments[index]
        manifest.layers[at] = layers
        manifest.seconds[at] += time.monotonic() - begun
        total = sum(file.stat().st_size for file in output.weight_files)
        facts |= {"stage": stage.name, "parameters": here.parameters_after, "bytes": total}
        manifest.facts["segments"] = [*manifest.facts.get("segments", [])[:index], facts]
        manifest.save()
        output.publish()
        if index:
            shutil.rmtree(folder.path, ignore_errors=True)
        folder = read_folder(place)
    return plan.on(folder) if plan.segments else plan


def follow(plan: Plan, texts: Texts, scratch: Path) -> None:
    """What the other processes of a launch do meanwhile: train with the first, and wait for it before they can."""
    places = _places(plan, scratch)
    done = together(lambda: _done(places))
    for index, (segment, place) in enumerate(zip(plan.segments[done:], places[done:], strict=True), start=done):
        while index and not places[index - 1].exists():
            time.sleep(1)
        if segment.recipe.trainer:
            here = segment.on(read_folder(places[index - 1])) if index else segment
            output = OutputFolder(place, len(here.shards))
            train(here, plan.original, output.scratch / TRAINING, texts, lambda *_: None)


def is_companion() -> bool:
    """Whether another process of the same launch does the work that only one can do."""
    return int(os.environ.get("RANK", "0")) > 0


def _places(plan: Plan, scratch: Path) -> list[Path]:
    """Where each segment leaves its folder."""
    return [
        scratch / "segments" / f"{index}-{segment.recipe.stages[0].name}" for index, segment in enumerate(plan.segments)
    ]


def _done(places: Sequence[Path]) -> int:
    """How many segments are done: the last one's folder is still there."""
    return max((index + 1 for index, place in enumerate(places) if place.exists()), default=0)


def together(look: Callable[[], int]) -> int:
    """What each process sees before the first of them changes anything."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return look()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    state.wait_for_everyone()
    seen = look()
    state.wait_for_everyone()
    return seen


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
    trained = train(plan, original, output.scratch / TRAINING, texts, tell)
    weights = Weights(plan.folder)
    state = {**trained.state, **taken_apart(trained.state, weights.stacks)}
    tied = {plan.anatomy.head: plan.anatomy.embedding}

    def stored(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value = state.get(name, state.get(f"{tied.get(path, path)}.{leaf}"))
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
    if trained.learned:
        save_file(trained.learned, output.partial / LEARNED)
    return [], trained.facts


def train(plan: Plan, teacher: Folder, work: Path, texts: Texts, tell: Progress) -> Trained:
    """What every process of a training does alike."""
    stage = plan.recipe.trainer
    length = stage.training.sequence_length or plan.sequence_length
    windows, held_out = texts.for_training(stage.dataset, stage.training.tokens, length, plan.recipe.calibration)
    try:
        trained = stage.train(plan.folder.path, teacher.path, windows, held_out, work, tell)
    except ValueError as error:
        raise RequestError(f"{stage.name}: {error}") from error
    together(lambda: 0)  # or the first would take the folder away from under the others
    return trained


def _within(tell: Progress, index: int, count: int, name: str) -> Progress:
    """Progress of one of several parts, as a share of the whole."""
    return lambda phase, share, words: tell(phase, (index + share) / count, f"{name}: {words}")
