"""The search for a shape, where a recipe begins with one: choices are built in scratch, measured, and the best is run.

`compress.prune.shape` says what is searched. A choice is built like any segment, from the first windows, and its
predictions are compared with the original's on the last ones. What is found takes the place of the stage `shape`: the
recipe that is run, reported and saved has stages that anybody can run again without a search. It is noted in the
manifest, where a run that is resumed finds it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from compress.bench import Work, bench
from compress.calibrate import BATCH_TOKENS
from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.manifest import Manifest
from compress.errors import DataError, RecipeError, RunError, eval_package
from compress.models import anatomy_for
from compress.models.headers import Folder, context_length, read_json
from compress.models.store import LazyModel, compute_dtype
from compress.pipeline.job import Job
from compress.pipeline.segments import together
from compress.pipeline.texts import Texts
from compress.plan import Plan, make_plan, refuse_quantized
from compress.prune.depth import Depth
from compress.prune.halves import HALVES
from compress.prune.shape import ROUNDING, Choice, Shape, best, predicted, tightest
from compress.recipe import Recipe
from compress.scoring import Progress


def suppose_shape(recipe: Recipe, folder: Folder) -> Plan:
    """The plan of a recipe, of the largest shape within the budget where it begins with a search for one.

    Raises as `make_plan` does, with what speaks against any shape that may be found.
    """
    shape: Shape | None = recipe.searcher
    if shape is None:
        return make_plan(recipe, folder)
    refuse_quantized(folder)
    anatomy = anatomy_for(folder.config, folder.shapes)
    if problems := shape.problems(folder, anatomy):
        where = recipe.where("stages", 0, shape.name)
        raise RecipeError([f"{where}: {problem}" for problem in problems])
    choices, plans, problems = shape.fitting(folder, anatomy), list[Plan](), list[str]()
    for choice in choices:
        try:
            plans.append(make_plan(recipe.found(choice.stages(shape.samples)), folder))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError([*dict.fromkeys(problems)])
    note = (
        f"the shape is decided once calibration has been seen, within {shape.budget:.1%} of the {shape.kind}; a plan "
        f"shows the largest: {choices[0]}"
    )
    return replace(plans[0], asked=recipe, notes=(*plans[0].notes, note))


def find_shape(plan: Plan, texts: Texts, folder: OutputFolder, manifest: Manifest, device: str, tell: Progress) -> Plan:
    """The plan with the shape that was searched for; any other as it is. `folder`, `manifest`: of the whole run."""
    if plan.asked is None:
        return plan
    together(lambda: 0)
    if "shape" not in manifest.facts:
        begun = time.monotonic()
        facts = Search.create(plan, texts, folder.scratch / "shape", device, tell).decide()
        count = len(_with_shape(plan, facts).recipe.stages)
        manifest.facts["shape"] = facts | {"seconds": time.monotonic() - begun}
        manifest.seconds, manifest.layers = [0.0] * count, [[] for _ in range(count)]
        manifest.save()
    found = _with_shape(plan, manifest.facts["shape"])
    folder.num_shards = len(found.shards)
    return found


def await_shape(plan: Plan, scratch: Path) -> Plan:
    """The same for the other processes of a launch, once the first has found it."""
    if plan.asked is None:
        return plan
    together(lambda: 0)
    while "shape" not in (facts := read_json(scratch / "manifest.json")["facts"]):
        time.sleep(1)
    return _with_shape(plan, facts["shape"])


def _with_shape(plan: Plan, facts: dict[str, Any]) -> Plan:
    assert plan.asked is not None
    taken = facts["candidates"][facts["chosen"]]
    choice = Choice(**{name: taken[name] for name in asdict(Choice())})
    found = make_plan(plan.asked.found(choice.stages(facts["fitted"])), plan.original)
    return replace(found, windows=plan.windows, notes=plan.notes)


@dataclass
class Search:
    """A search on its way."""

    plan: Plan
    """Of one of the shapes that the recipe may come to."""
    shape: Shape
    fitted: Texts
    """The windows that choices are built from."""
    held_out: Int[Tensor, "windows length"]
    """Those that they are measured on."""
    scratch: Path
    """A folder to be made and removed."""
    device: str
    dtype: torch.dtype
    tell: Progress
    divergences: dict[Choice, float] = field(default_factory=dict)
    """Of the predictions of what has been built from the original's, in nats."""
    times: dict[Choice, float] = field(default_factory=dict)
    """For a token, beside the original's."""
    gone: list[int] = field(default_factory=list)
    """Blocks, in the order in which the model does without them."""

    @classmethod
    def create(cls, plan: Plan, texts: Texts, scratch: Path, device: str, tell: Progress) -> Search:
        """Raises DataError where there are too few windows to keep one apart."""
        assert plan.asked is not None
        shape: Shape = plan.asked.searcher
        tokens = texts.windows.tokens[: shape.samples]
        if len(tokens) < 2:
            raise DataError(
                f"a shape is measured on windows that it was not fitted on, and there is {len(tokens)} in all"
            )
        count = len(tokens) - max(1, len(tokens) // 4)
        fitted = replace(texts, windows=replace(texts.windows, tokens=tokens[:count]))
        dtype = compute_dtype(plan.layers[0].dtype, plan.recipe.calibration.dtype, device)
        return cls(plan, shape, fitted, tokens[count:], scratch, device, dtype, tell)

    def decide(self) -> dict[str, Any]:
        """What is taken, and all that was measured; plain data.

        Raises RunError where no shape is as fast as it should be.
        """
        shares, limit = self.shape.shares(self.plan.original, self.plan.anatomy), self.shape.budget
        tried: list[Choice] = []
        while True:
            fitting = tightest(shares, limit)
            parts = {part for choice in fitting for part in choice.parts}
            for part in sorted(parts, key=lambda part: part.removed, reverse=True):
                self.measure(part)
            new = [each for each in best(fitting, self.divergences, self.shape.candidates) if each not in tried]
            if not new:
                raise RunError(
                    f"latency={self.shape.budget} was not reached: what was built takes {min(self.times.values()):.3f} "
                    "of the original's time at least. Ask for more, or offer smaller ffn and heads"
                )
            for choice in new:
                self.measure(choice, timed=self.shape.kind == "latency")
            tried += new
            counted = {choice: self.times.get(choice, shares[choice]) for choice in tried}
            within = [choice for choice in tried if counted[choice] <= self.shape.budget + ROUNDING]
            if within:
                break
            limit -= min(counted.values()) - self.shape.budget
        alone = {part: self.divergences[part] for choice in tried for part in choice.parts}

        def told(choice: Choice) -> dict[str, Any]:
            found = {**asdict(choice), "share": shares[choice], "measured": self.divergences[choice]}
            return found | ({"latency": self.times[choice]} if choice in self.times else {})

        return {
            "budget": [self.shape.kind, self.shape.budget],
            "fitted": len(self.fitted.windows.tokens),
            "held_out": len(self.held_out),
            "alone": [told(part) for part in self.divergences if part.parts == (part,)],
            "candidates": [told(choice) | {"predicted": predicted(choice, alone)} for choice in tried],
            "chosen": tried.index(min(within, key=lambda choice: self.divergences[choice])),
        }

    def measure(self, choice: Choice, *, timed: bool = False) -> None:
        """Note the divergence of a choice, and its time if that is asked for."""
        if choice in self.divergences and (choice in self.times or not timed):
            return
        self.tell("shape", 0.0, f"measuring {choice}")
        with self._built(choice) as folder:
            found = self._divergence(folder)
            self.divergences[choice] = found if math.isfinite(found) else math.inf
            if timed:
                self.times[choice] = time_ratio(folder, self.plan.original)

    @contextmanager
    def _built(self, choice: Choice) -> Iterator[Path]:
        """Within, the model in this shape."""
        learned = self._learned(choice.removed)
        first = self.plan.segments[0]
        recipe = replace(first.recipe, stages=choice.stages(len(self.fitted.windows.tokens)))
        plan = replace(first, recipe=recipe).having(learned)
        output = OutputFolder(self.scratch / "model", len(plan.shards))
        manifest = Manifest.begin(output, "", len(recipe.stages), resume=False)
        model = LazyModel(plan.open_weights(learned), dtype=self.dtype, device=self.device)
        job = Job(plan, output, model, self.fitted, manifest, lambda *_: None)
        job.walk()
        job.finish()
        yield output.partial
        shutil.rmtree(self.scratch)

    def _learned(self, count: int) -> dict[str, Tensor]:
        """What the stage `depth` would find of so many blocks."""
        if len(self.gone) < count:
            depth = Depth(remove=count, samples=len(self.fitted.windows.tokens))
            model = LazyModel.open(self.plan.original.path, dtype=self.dtype, device=self.device)
            units, _ = depth.choose(model, self.fitted.windows.tokens, self.scratch)
            self.gone = [block for block, _ in units]
        nothing = torch.empty(0, dtype=torch.int64)
        return {"removed": torch.tensor(sorted(self.gone[:count])), **dict.fromkeys(HALVES, nothing)} if count else {}

    @torch.inference_mode()
    def _divergence(self, folder: Path) -> float:
        """The mean KL divergence of a model's predictions from the original's, in nats."""
        with eval_package():
            from eval.divergence import kl_divergence
        original, model = (
            LazyModel.open(path, dtype=self.dtype, device=self.device) for path in (self.plan.original.path, folder)
        )
        with original.streamed(), model.streamed():
            found = [
                kl_divergence(original.logits(tokens), model.logits(tokens))
                for tokens in self.held_out.split(max(1, BATCH_TOKENS // self.held_out.shape[1]))
            ]
        return torch.cat(found).mean().item()


def time_ratio(folder: Path, original: Folder) -> float:
    """The time a model takes to write a token, over that of the original, in turns on this machine."""
    half = context_length(original.config) // 2
    work = Work(prompt_tokens=min(64, half), tokens=min(32, half))
    return 1 / bench(str(folder), baseline=str(original.path), work=work)["ratio"]["decode_tokens_per_second"]
