"""What a model computes, as an objective wants it: logits, states after some blocks, values of the last one.

States are compared block by block, at the same relative depth. Where widths are the same the student's are to be the
teacher's own; where they differ, the projection between them is the least-squares one over some windows, found once,
before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from compress.distill.features import Projection, least_squares
from compress.distill.objective import Outputs
from compress.errors import ModelError
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.headers import read_folder


def open_model(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Anatomy]:
    """A whole model in memory. Raises ModelError where the folder is none."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    folder = read_folder(path)
    anatomy = anatomy_for(folder.config, folder.shapes)
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), anatomy


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which matrix products are computed in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Capture:
    """Runs a model and takes along what is asked for: states after `blocks`, and values of the last block.

    `model` is the bare one; what is run may be wrapped, and may compute in another `dtype`. Raises ModelError where
    values are asked for and no layer makes them and nothing else.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, dtype: torch.dtype, blocks: Sequence[int], values: bool
    ) -> None:
        self.blocks = blocks
        self.dtype = dtype
        self.values: Tensor | None = None
        if values:
            last = num_blocks(model, anatomy) - 1
            layers = [name for name, role in anatomy.roles.items() if role == "attn.v"]
            if not layers:
                raise ModelError(no_values(anatomy))
            model.get_submodule(f"{anatomy.blocks}.{last}.{layers[0]}").register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: Any, output: Tensor) -> None:
        self.values = output

    def __call__(self, model: nn.Module, tokens: Int[Tensor, "windows length"]) -> Outputs:
        with arithmetic(tokens.device, self.dtype):
            result = model(input_ids=tokens, use_cache=False, output_hidden_states=bool(self.blocks))
        hidden = [result.hidden_states[block + 1] for block in self.blocks]  # the first are the embeddings
        values, self.values = self.values, None
        return Outputs(result.logits, hidden, values)


def no_values(anatomy: Anatomy) -> str:
    """What to say where values are made together with keys."""
    return f"{anatomy.family} models have no layer of their own for values: set relations to 0"


def num_blocks(model: nn.Module, anatomy: Anatomy) -> int:
    return len(model.get_submodule(anatomy.blocks))  # type: ignore[arg-type]


@torch.no_grad()
def projections_between(answers: Iterable[tuple[Outputs, Outputs]]) -> list[Projection]:
    """For each pair of states the projection that fits them best, or the identity where they are of one width.

    `answers`: of student and teacher, for windows after windows.
    """
    sums: list[dict[str, Tensor]] = []
    for student, teacher in answers:
        pairs = zip(student.hidden, teacher.hidden, strict=True)
        found = [_moments(own.flatten(0, 1).float(), given.flatten(0, 1).float()) for own, given in pairs]
        if sums:
            found = [{name: each[name] + more[name] for name in each} for each, more in zip(sums, found, strict=True)]
        sums = found
    projections = []
    for each in sums:
        energy = float(each["energies"].sum() / each["tokens"])
        if "second" in each:
            projections.append(least_squares(each["second"] / each["tokens"], each["cross"] / each["tokens"], energy))
        else:
            projections.append(Projection(torch.eye(len(each["energies"]), device=each["energies"].device), energy))
    return projections


def _moments(own: Float[Tensor, "tokens student"], given: Float[Tensor, "tokens teacher"]) -> dict[str, Tensor]:
    """Sums over tokens of what a projection is found from, and how many there are."""
    sums = {"tokens": own.new_tensor(len(own)), "energies": given.square().sum(dim=0)}
    return sums if own.shape == given.shape else sums | {"second": own.T @ own, "cross": own.T @ given}
