"""A training under way: the student, its teacher, and what a step does.

Several processes hold one each and call its methods together. A loss here is the sum over some tokens divided by the
number of tokens in the whole batch, so that sums, over forward passes and over processes, are means over tokens.
Whatever wraps the model averages gradients over processes, hence the factor in `step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from compress.distill import lora
from compress.distill.capture import Capture, arithmetic, num_blocks, open_model, projections_between
from compress.distill.objective import Objective
from compress.distill.optimizer import make_optimizer, parameter_groups
from compress.distill.sampling import continued, empty_cache
from compress.distill.schedule import batch_of, chance, cut_of, relative_rate
from compress.distill.teachers import LiveTeacher, Teacher, ask
from compress.errors import NumericalError
from compress.models.store import compute_dtype

if TYPE_CHECKING:
    from compress.distill.train import Training

PROJECTION_WINDOWS = 32
"""From which energies and projections of states are found."""


class Trainer:
    """Opens student and teacher; raises what `compress.distill.train` says.

    `windows`: those to train on and, behind them, `num_held_out` others. `work`: where a teacher's answers are kept.
    """

    def __init__(
        self,
        accelerator: Any,
        student: Path,
        teacher: Path | None,
        windows: Int[Tensor, "windows length"],
        num_held_out: int,
        training: Training,
        objective: Objective,
        work: Path,
        tell: Callable[[str, float, str], None],
        prepare: Callable[[nn.Module], None] | None,
    ) -> None:
        self.accelerator, self.training, self.objective, self.windows = accelerator, training, objective, windows
        self.held_out = torch.arange(len(windows) - num_held_out, len(windows))
        self.steps = training.tokens // (training.batch_size * windows.shape[1])
        self.share = training.batch_size // accelerator.num_processes
        """Windows of a batch that are this process's."""
        self.micro_batch = training.micro_batch or self.share
        device, dtype = accelerator.device, compute_dtype("BF16", training.precision, accelerator.device.type)
        self.dtype = dtype
        if not (objective.divergence or objective.hidden or objective.relations):
            teacher = None  # cross-entropy alone does not ask for one
        self.teacher: Teacher = lambda rows, tokens: None
        if teacher and training.teacher_top_k:
            known = torch.cat([self._batch(0, self.steps * training.batch_size), self.held_out]).unique()
            k, parts = training.teacher_top_k, self.micro_batch
            self.teacher = ask(teacher, windows, known, k, objective, parts, accelerator, dtype, work, tell)

        module, anatomy = open_model(student, torch.float32)
        if prepare:
            prepare(module)
        self.products = {}
        if training.lora_rank:
            self.products = lora.attach(module, anatomy.blocks, training.lora_rank, chance("low rank", training.seed))
        if training.gradient_checkpointing:
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # as transformers renamed it
            enable = getattr(module, new if hasattr(module, new) else old)
            enable({"use_reentrant": False})
        self.bare = module
        blocks = num_blocks(module, anatomy)
        compared = range(blocks) if objective.hidden else ()
        self.capture = Capture(module, anatomy, dtype, compared, objective.relations > 0)
        self.parameters = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        """Their names, tied ones once, and whether they are trained."""
        groups, self.rates = parameter_groups(module, training.weight_decay, training.scale_learning_rate)
        self.model, self.optimizer = accelerator.prepare(module, make_optimizer(training.optimizer, groups, device))

        if teacher and not training.teacher_top_k:
            self.teacher = LiveTeacher.open(teacher, objective, blocks, device, dtype)
        self.projections = []
        if isinstance(self.teacher, LiveTeacher) and objective.hidden:
            self.model.eval()
            parts = self._batch(0, PROJECTION_WINDOWS).split(self.micro_batch)
            batches = ((rows, windows[rows].to(device)) for rows in parts)
            self.projections = projections_between(
                (self.capture(self.model, tokens), self.teacher(rows, tokens)) for rows, tokens in batches
            )

    def held_out_loss(self) -> float:
        """The objective on the held-out windows. Raises NumericalError where it is not finite."""
        self.model.eval()
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        places = torch.arange(process, -(-len(self.held_out) // processes) * processes, processes)
        counted = places < len(self.held_out)  # as many for each process: the last window may come more than once
        rows = self.held_out[places.clamp(max=len(self.held_out) - 1)]
        total = torch.zeros((), device=self.accelerator.device)
        count = int(to_learn(self.windows[self.held_out]).sum())
        for part, real in zip(rows.split(self.micro_batch), counted.split(self.micro_batch), strict=True):
            tokens = self.windows[part]
            with torch.no_grad():
                total += self._loss(part, tokens, to_learn(tokens) & real.unsqueeze(1), count)
        return self._sum(total, "the held-out loss")

    def step(self, number: int) -> tuple[float, float]:
        """Make one step: the loss of its batch, and its learning rate. Raises NumericalError before weights change."""
        training, processes = self.training, self.accelerator.num_processes
        torch.manual_seed(chance("step", training.seed, number, self.accelerator.process_index).initial_seed())
        rate = training.learning_rate * relative_rate(number, self.steps, training.warmup, training.final_learning_rate)
        for group, relative in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * relative
        rows, tokens, valid = self._text(number)
        count = int(valid.sum()) * processes
        total = torch.zeros((), device=tokens.device)
        parts = list(zip(*(each.split(self.micro_batch) for each in (rows, tokens, valid)), strict=True))
        self.model.train()
        for index, (some, text, counted) in enumerate(parts, start=1):
            with nullcontext() if index == len(parts) else self.accelerator.no_sync(self.model):
                loss = self._loss(some, text, counted, count)
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        mean = self._sum(total, f"step {number + 1}: the loss")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), training.clip)
        self._check(float(norm), f"step {number + 1}: the loss is {mean:g}, but the norm of its gradient")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, rate

    def weights(self, *, of_all: bool = False) -> dict[str, Tensor]:
        """Trained parameters, or all, as they are now: copies in float32 on the CPU of the main process, else none."""
        state = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return {}
        wanted = [name for name, is_trained in self.parameters.items() if is_trained or of_all]
        return {name: state[name].detach().to("cpu", torch.float32, copy=True) for name in wanted}

    def merged(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parameters with the best of those that were trained, products merged; on the main process."""
        state = self.weights(of_all=True) | best
        return lora.merged(state, self.products) if state else {}

    def _batch(self, step: int, size: int) -> Int[Tensor, " windows"]:
        return batch_of(step, size, len(self.windows) - len(self.held_out), self.training.seed)

    def _text(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of a step: numbers of windows, their tokens, and which of them to learn from."""
        training, process = self.training, self.accelerator.process_index
        mine = slice(process * self.share, (process + 1) * self.share)
        rows = self._batch(number, training.batch_size)[mine]
        tokens = self.windows[rows].to(self.accelerator.device)
        cut = cut_of(number, tokens.shape[1], training.on_policy, training.seed)
        if cut is None:
            return rows, tokens, to_learn(tokens)
        shape = training.batch_size, tokens.shape[1] - cut
        draws = torch.rand(shape, generator=chance("draws", training.seed, number))[mine].to(tokens.device)
        with arithmetic(tokens.device, self.dtype):
            tokens = continued(self.model, empty_cache(self.bare), tokens, draws)
        return rows, tokens, to_learn(tokens, cut)

    def _loss(
        self,
        rows: Int[Tensor, " windows"],
        tokens: Int[Tensor, "windows length"],
        valid: Bool[Tensor, "windows length"],
        count: int,
    ) -> Tensor:
        device = self.accelerator.device
        tokens, valid = tokens.to(device), valid.to(device)
        said, outputs = self.teacher(rows, tokens), self.capture(self.model, tokens)
        targets = tokens.roll(-1, dims=1)
        parts = self.objective.loss(outputs, said, valid, count=count, targets=targets, projections=self.projections)
        if self.objective.divergence or self.objective.cross_entropy:
            return parts.total
        # Processes wait for gradients of all layers, and from states alone the last ones have none.
        return parts.total + 0 * outputs.logits[:, 0, 0].sum()

    def _sum(self, loss: Tensor, name: str) -> float:
        """Over all processes. Raises NumericalError where it is not finite."""
        return self._check(float(self.accelerator.reduce(loss, "sum")), name)

    def _check(self, value: float, name: str) -> float:
        if math.isfinite(value):
            return value
        raise NumericalError(
            f"{name} is {value}. The last checkpoint is as it was; try a lower learning_rate than "
            f"{self.training.learning_rate:g}, or precision float32"
        )


def to_learn(tokens: Int[Tensor, "windows length"], cut: int = 1) -> Bool[Tensor, "windows length"]:
    """Tokens whose next one is at `cut` or behind it; what comes after a window is not known."""
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    valid[:, cut - 1 : -1] = True
    return valid
