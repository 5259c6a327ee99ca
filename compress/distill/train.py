"""Training a student towards its teacher: options, the loop, and the result.

    for each step:   loss of its windows, a mean over tokens  →  gradient, clipped  →  AdamW at the rate of the step

What is minimised is said by an `Objective`; which windows, at what rate and by what chance, by
`compress.distill.schedule`. Weights are kept in float32; matrix products are of bfloat16 where a device is quick at it.
The objective is measured on held-out windows before the first step and then every so often. Healing on little text can
leave a model worse than it was, so what comes back are the weights that were best on those windows, and training ends
early when they have not become better for a while.

The engine is accelerate, so it runs on one device, on several, or sharded over them (FSDP), as its launcher says. A
batch is one for all processes. Each takes its share of the windows, and every loss is divided by the number of tokens
in the whole batch; neither the number of processes nor that of windows in one forward pass changes what is computed,
except by rounding.

A training may be killed at any moment; the same call goes on from the last checkpoint, to the same weights. On a CPU
they are the same bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from compress.core.kv import heads_of
from compress.distill.capture import no_values
from compress.distill.checkpoint import Checkpoints, Curve, key_of
from compress.distill.objective import Objective
from compress.distill.steps import Trainer
from compress.errors import RequestError
from compress.models.anatomy import Anatomy
from compress.models.headers import context_length

Tell = Callable[[str, float, str], None]
"""Called with the phase, the share of it that is done (0…1), and a few words."""
Optimizer = Literal["adamw", "adamw8bit"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Training:
    """How to train, whatever on."""

    tokens: int = 1_000_000
    """Seen in all."""
    sequence_length: int | None = None
    """Tokens per window; null: the calibration's."""
    batch_size: int = 8
    """Windows per step, over all processes."""
    learning_rate: float = 3e-4
    """The highest."""
    warmup: float = 0.05
    """The share of steps in which it rises."""
    final_learning_rate: float = 0.1
    """Where the cosine ends, relative to the highest."""
    scale_learning_rate: float = 0.1
    """Of learned scales and zero points, relative to that of weights."""
    weight_decay: float = 0.0
    """Of matrices: vectors, learned scales and zero points have none."""
    clip: float = 1.0
    """The largest norm of a gradient."""
    optimizer: Optimizer = "adamw"
    precision: Precision = "auto"
    """Of matrix products. auto: bfloat16 on a GPU, and on a CPU that has a matrix unit for it."""
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    """Windows per forward pass and process; null: all of its share."""
    checkpoint_every: int = 50
    """Steps."""
    evaluate_every: int = 20
    """Steps."""
    patience: int = 5
    """Evaluations without improvement after which training ends."""
    seed: int = 0
    lora_rank: int | None = None
    """Train only products of this rank, beside all linear layers of the blocks."""
    teacher_top_k: int | None = None
    """Ask the teacher before training, and keep so many of its likeliest tokens on disk."""
    on_policy: float = 0.0
    """The share of batches whose windows the student continues by itself."""

    def __post_init__(self) -> None:
        counts = "tokens batch_size micro_batch checkpoint_every evaluate_every patience lora_rank teacher_top_k"
        for name in (*counts.split(), "sequence_length"):
            least = 2 if name == "sequence_length" else 1
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        for name in ("learning_rate", "scale_learning_rate", "clip"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("final_learning_rate", "on_policy", "warmup", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value} must lie in 0 … 1")
        for name, known in (("optimizer", get_args(Optimizer)), ("precision", get_args(Precision))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        if self.on_policy and self.teacher_top_k:
            raise ValueError(
                "on_policy needs the teacher during training, as text is not known before: leave out top_k"
            )


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of it."""

    state: dict[str, Tensor]
    """The best weights by parameter name, in float32, on the CPU; tied ones once."""
    steps: int
    tokens: int
    curve: Curve
    best_step: int
    stopped_early: bool
    learned: dict[str, Tensor] = field(default_factory=dict)
    """What was learned besides, by modules that `prepare` put there; for the stage that did to fill in."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {name: getattr(self, name) for name in ("steps", "tokens", "curve", "best_step", "stopped_early")}


def train(
    student: Path,
    teacher: Path | None,
    windows: Int[Tensor, "windows length"],
    held_out: Int[Tensor, "windows length"],
    training: Training,
    objective: Objective,
    work: Path,
    tell: Tell,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Trained:
    """Train a student, both given as ordinary Hugging Face folders, on windows of tokens without padding.

    `work`: a folder to be made, which all processes see; a training found in it goes on. `prepare`: called with the
    student, to change modules in place; what it does is not told from the folder. The global generator of torch is
    seeded.

    Raises ValueError where options do not fit together or to the windows, ModelError where a folder is no model or has
    not what the objective needs, RequestError where the optimizer or the number of processes is impossible here,
    OutputError where `work` holds another training, NumericalError where a loss or a gradient is not finite. Then, and
    after a StorageError, the last checkpoint is still there.
    """
    from accelerate import Accelerator

    _check(teacher, windows, held_out, training, objective, prepare)
    accelerator = Accelerator(mixed_precision="no")  # `precision` is kept by the trainer, for student and teacher alike
    if training.batch_size % accelerator.num_processes:
        raise RequestError(
            f"batch_size={training.batch_size} cannot be shared out among {accelerator.num_processes} processes; "
            "use a multiple of their number"
        )
    facts = [asdict(training), asdict(objective), accelerator.num_processes]
    checkpoints = Checkpoints(work, key_of(facts, [windows, held_out], [student, teacher] if teacher else [student]))
    steps = training.tokens // (training.batch_size * windows.shape[1])
    if checkpoints.latest is None or checkpoints.latest.name != "trained":
        checkpoints.prepare(accelerator)
        tell = tell if accelerator.is_main_process else _silence
        both = torch.cat([windows, held_out]).long().cpu()
        models = student, teacher, both, len(held_out)
        _run(Trainer(accelerator, *models, training, objective, work, tell, prepare), checkpoints, steps, tell)
        accelerator.free_memory()
    assert checkpoints.latest is not None
    curve, state = checkpoints.read(checkpoints.latest)
    done = len(curve) - 1
    return Trained(state, done, done * training.batch_size * windows.shape[1], curve, _best(curve), done < steps)


def _run(trainer: Trainer, checkpoints: Checkpoints, steps: int, tell: Tell) -> None:
    """From the last checkpoint, or the beginning, to the result."""
    training, accelerator = trainer.training, trainer.accelerator
    folder = checkpoints.latest
    if folder is None:
        curve: Curve = [{"step": 0, "loss": None, "held_out": trainer.held_out_loss(), "learning_rate": 0.0}]
        best = trainer.weights()
    else:
        curve, best = checkpoints.read(folder)
        accelerator.load_state(str(folder))
    begun, seconds = len(curve) - 1, 0.0
    while (done := len(curve) - 1) < steps and _evaluations_since(curve, _best(curve)) < training.patience:
        started = time.perf_counter()
        loss, rate = trainer.step(done)
        seconds += time.perf_counter() - started
        done += 1
        held_out = trainer.held_out_loss() if done % training.evaluate_every == 0 or done == steps else None
        curve.append({"step": done, "loss": loss, "held_out": held_out, "learning_rate": rate})
        if _best(curve) == done:
            best = trainer.weights()
        if done % training.checkpoint_every == 0:
            checkpoints.save(accelerator, curve, best)
        speed = (done - begun) * training.batch_size * trainer.windows.shape[1] / seconds
        last = next(point["held_out"] for point in reversed(curve) if point["held_out"] is not None)
        words = f"step {done} of {steps} · loss {loss:.3f} · held out {last:.3f} · {speed:,.0f} tokens/s"
        tell("distill", done / steps, words)
    checkpoints.finish(accelerator, curve, trainer.merged(best))


def _best(curve: Curve) -> int:
    """The step after which the held-out loss was lowest, the first of them."""
    measured = [point for point in curve if point["held_out"] is not None]
    return min(measured, key=lambda point: point["held_out"])["step"]


def _evaluations_since(curve: Curve, step: int) -> int:
    return sum(point["held_out"] is not None for point in curve[step + 1 :])


def _silence(phase: str, share: float, words: str) -> None:
    """Progress of a process that is not the main one."""


def obstacles(
    training: Training, objective: Objective, anatomy: Anatomy, config: Mapping[str, Any], length: int
) -> list[str]:
    """Why a model of this config cannot be trained so on windows of `length` tokens, a sentence each."""
    if anatomy.head is None:
        return [f"the {anatomy.family} model has no head, and so no distribution to learn"]
    found = unfit(training, objective, training.sequence_length or length)
    context, vocabulary = context_length(config), config.get("vocab_size", math.inf)
    if (training.sequence_length or 0) > context:
        found.append(f"sequence_length={training.sequence_length} is more than the model's context, {context}")
    if (training.teacher_top_k or 0) > vocabulary:
        found.append(f"teacher_top_k={training.teacher_top_k} is more than the vocabulary's {vocabulary}")
    if objective.relations and "attn.v" not in anatomy.roles.values():
        found.append(no_values(anatomy))
    elif objective.relations and math.prod(heads_of(config)) % (objective.relation_heads or 1):
        width = math.prod(heads_of(config))
        found.append(f"relation_heads={objective.relation_heads} must divide the width of values, {width}")
    return found


def unfit(training: Training, objective: Objective, length: int) -> list[str]:
    """What does not go together, whatever is trained."""
    found = []
    if training.tokens < training.batch_size * length:
        found.append(
            f"tokens={training.tokens} are less than one batch of {training.batch_size} windows of {length} tokens"
        )
    if training.teacher_top_k and (objective.hidden or objective.relations):
        found.append(
            f"teacher_top_k={training.teacher_top_k} keeps what a teacher says, not what it computes on the way: "
            "set hidden and relations to 0, or leave it out"
        )
    return found


def _check(
    teacher: Path | None,
    windows: Tensor,
    held_out: Tensor,
    training: Training,
    objective: Objective,
    prepare: Callable[[nn.Module], None] | None,
) -> None:
    """Raises ValueError where they do not fit together."""
    length = windows.shape[1]
    if not len(windows) or not len(held_out) or held_out.shape[1] != length:
        raise ValueError(
            f"windows {list(windows.shape)} and held-out ones {list(held_out.shape)}: give some of each, of one length"
        )
    if training.sequence_length not in (None, length):
        raise ValueError(f"sequence_length={training.sequence_length}, but windows have {length} tokens")
    for problem in unfit(training, objective, length):
        raise ValueError(problem)
    if training.lora_rank and prepare:
        raise ValueError(f"lora_rank={training.lora_rank}: products cannot be merged into layers that are prepared")
    if training.teacher_top_k and not teacher:
        raise ValueError(f"teacher_top_k={training.teacher_top_k} needs a teacher")
