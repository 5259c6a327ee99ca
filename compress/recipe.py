"""A recipe: everything of a run but the model and the output folder, and both may be given in it too.

YAML exists only here and in `compress.draft`, which reads it strictly; each problem says where it is:

    recipes/x.yaml:4:27: stages[1].gptq has no field 'dampning'. Did you mean 'damping'?
    --set calibration.samples: calibration.samples must be a whole number of at least 1, not 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from compress.draft import Draft, Dumper, KeyPath, nearest, settable
from compress.errors import RecipeError
from compress.models.selection import did_you_mean

Count = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
Length = Annotated[int, Field(ge=8, description="a whole number of at least 8")]
Seed = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
Limit = Annotated[float, Field(gt=0, description="a number above 0")]


LEARNER = "qat"
"""The quantizer whose grids are trained before the walk."""


@dataclass(frozen=True)
class Calibration:
    """The tokens whose activations the stages see."""

    dataset: str = "ultrachat"
    """A named dataset or a local file."""
    samples: Count = 256
    sequence_length: Length = 2048
    seed: Seed = 0
    split: str = "train"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the calibration pass."""


@dataclass(frozen=True)
class Evaluation:
    """The tokens on which the finished checkpoint is compared with the original."""

    text: tuple[str, ...] = ()
    """Files; empty: the part of the calibration text that calibration did not use."""
    samples: Count = 32
    """Windows that are scored."""
    sequence_length: Length | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """How the result is stored."""

    format: str = "compressed-tensors"
    compression: Literal["auto", "pack-quantized", "int-quantized"] = "auto"
    also: tuple[str, ...] = ()
    """Further formats that the folder is converted to, each beside it."""


@dataclass(frozen=True)
class Gates:
    """What the checkpoint must meet, compared with the original; None: not asked for."""

    max_perplexity_ratio: Limit | None = None
    max_kl_divergence: Limit | None = None
    max_bytes_ratio: Limit | None = None


@dataclass(frozen=True)
class Target:
    """Where the checkpoint will run: what cannot run there is an error of the plan."""

    engine: Literal["vllm", "sglang", "transformers"] | None = None
    """null: any."""
    gpu: Literal["turing", "ampere", "ada", "hopper", "blackwell"] | None = None
    """The oldest generation that will run it."""
    tensor_parallel: Count = 1
    """GPUs that each layer is divided among."""


@dataclass(frozen=True)
class Recipe:
    """A whole run, checked and with every default filled in."""

    name: str
    stages: tuple[Any, ...]
    """In the order they run; each honours `compress.stage.Stage`."""
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointOptions = CheckpointOptions()
    gates: Gates = Gates()
    target: Target = Target()
    model: str | None = None
    output: str | None = None
    source: str = field(default="", compare=False)
    """The file, or the shipped recipe, it was read from."""
    positions: Mapping[KeyPath, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each key and list item was written: `file:line:column`, or `--set path`."""
    segment: bool = field(default=False, compare=False, repr=False)
    """Whether this is one segment of another recipe."""

    @property
    def calibrated(self) -> bool:
        """Whether any stage needs calibration inputs."""
        return any(stage.calibrated for stage in self.stages)

    @property
    def two_streams(self) -> bool:
        """Whether any stage wants the original model's activations beside the compressed one's."""
        return any(stage.two_streams for stage in self.walked)

    @property
    def segments(self) -> list[int]:
        """The stages that are runs of their own, of one stage each, from an ordinary folder to another.

        They come first: those that change the model's shape or train it, and the training of a learner behind them.
        """
        behind = len(self.stages) - len(self.walked)
        learner = [behind for stage in self.walked[:1] if stage.name == LEARNER]
        return [*range(behind), *learner]

    @property
    def walked(self) -> tuple[Any, ...]:
        """The stages that share one walk; of a segment, its only one."""
        walked = self.stages
        while walked and is_segment(walked[0]) and not self.segment:
            walked = walked[1:]
        return walked

    def only(self, index: int) -> Recipe:
        """The run of one segment: its result is an ordinary folder."""
        stage, path = self.stages[index], ("stages", index)
        positions = {
            ("stages", 0, *key[2:]) if key[:2] == path else key: place for key, place in self.positions.items()
        }
        return dataclasses.replace(
            self,
            stages=(stage.trainer if stage.name == LEARNER else stage,),
            checkpoint=CheckpointOptions(format="dense"),
            gates=Gates(),
            positions=positions,
            segment=True,
        )

    @property
    def searcher(self) -> Any:
        """The first stage where it stands for others that calibration decides, None where it does not."""
        return next((stage for stage in self.stages[:1] if stage.role == "searcher"), None)

    def found(self, stages: Sequence[Any]) -> Recipe:
        """The recipe with these stages in the place of its searcher."""

        def moved(key: KeyPath) -> KeyPath:
            if key[:1] != ("stages",) or len(key) == 1 or not isinstance(key[1], int) or key[1] == 0:
                return key
            return ("stages", key[1] + len(stages) - 1, *key[2:])

        positions = {moved(key): place for key, place in self.positions.items()}
        positions |= {("stages", index): self.where("stages", 0) for index in range(len(stages))}
        return dataclasses.replace(self, stages=(*stages, *self.stages[1:]), positions=positions)

    @property
    def view(self) -> Any:
        """The stage that changes the model as a whole before the walk, None where the first of it does not."""
        return next((stage for stage in self.walked[:1] if stage.role == "view"), None)

    @property
    def shaper(self) -> Any:
        """The stage that changes the shape of each block, None where this is no such segment."""
        return next((stage for stage in self.walked if stage.role == "shaper"), None)

    @property
    def trainer(self) -> Any:
        """The stage that trains the model, None where this is no such segment."""
        return next((stage for stage in self.walked if stage.role == "trainer"), None)

    @property
    def allocator(self) -> Any:
        """The stage that decides the bits of the quantizers behind it, None where they are given."""
        return next((stage for stage in self.stages if stage.role == "allocator"), None)

    @property
    def cache(self) -> Any:
        """The stage that says how keys and values are kept, None where they keep their precision."""
        return next((stage for stage in self.stages if stage.role == "cache"), None)

    def where(self, *path: str | int) -> str:
        """Where to point in a complaint about `path`: its own place or that of the nearest part around it."""
        return nearest(self.positions, path) or self.source or self.name


def is_segment(stage: Any) -> bool:
    """Whether a stage is a run of its own: the model that comes out has another shape, or has been trained."""
    return stage.role in {"shaper", "trainer"} or (stage.role == "view" and stage.shrinks)


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by its name, or a file. Raises RecipeError with every problem it has."""
    source, names = str(name_or_path), shipped()
    path = names.get(source, Path(source))
    if not path.is_file():
        advice = did_you_mean(source, names) + f" Shipped: {', '.join(names)}."
        raise RecipeError(f"{source}: neither a file nor a shipped recipe.{advice}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: cannot be read: {error}.") from error
    return parse(text, source, overrides)


def parse(text: str, source: str, overrides: Sequence[str] = (), table: Mapping[str, type] | None = None) -> Recipe:
    """Turn YAML into a Recipe. `table`: stage classes by name. Raises RecipeError with every problem."""
    draft = Draft(source, stage_table() if table is None else table, Recipe)
    draft.read(text)
    for override in overrides:
        draft.override(override)
    recipe = draft.build(Recipe, draft.tree, ())
    if draft.problems:
        raise RecipeError(draft.problems)
    return dataclasses.replace(recipe, source=source, positions=draft.positions)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with nothing left to a default; `parse` reads it back to an equal Recipe."""
    tree = dataclasses.asdict(recipe)
    tree["stages"] = [{stage.name: dataclasses.asdict(stage)} for stage in recipe.stages]
    given = {each.name: tree[each.name] for each in settable(Recipe)}
    return yaml.dump(given, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with other values, `stage.field=value`. Raises RecipeError with every problem."""
    if not overrides:
        return recipe
    table = {stage.name: type(stage) for stage in recipe.stages}
    changed = parse(dump(recipe), recipe.source or recipe.name, overrides, table)
    return dataclasses.replace(changed, source=recipe.source, positions=recipe.positions)


def shipped() -> dict[str, Path]:
    """The recipes that come with netsuke, by name."""
    here = Path(__file__).resolve().parent
    folders = [folder for folder in (here / "_recipes", here.parent / "recipes") if folder.is_dir()]
    return {path.stem: path for folder in folders[:1] for path in sorted(folder.rglob("*.yaml"))}


def describe(path: Path) -> str:
    """The comment a recipe file opens with; empty where it opens with none."""
    first, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def stage_table() -> dict[str, type]:
    """Every stage a recipe may name. Only this needs torch."""
    from compress.distill import TRAINERS
    from compress.prune import PRUNERS
    from compress.quantize import ALLOCATORS, CACHES, CORRECTORS, METHODS
    from compress.transform import TRANSFORMS

    return {**TRAINERS, **TRANSFORMS, **PRUNERS, **ALLOCATORS, **METHODS, **CORRECTORS, **CACHES}
