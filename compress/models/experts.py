"""Experts of a mixture: files hold each matrix of each one, transformers' modules a parameter for all of them.

    mlp.experts.3.gate_proj.weight [width, hidden]  ─┐
    mlp.experts.3.up_proj.weight   [width, hidden]  ─┴─►  mlp.experts.gate_up_proj[3]  [2 · width, hidden]
    mlp.experts.3.down_proj.weight [hidden, width]  ───►  mlp.experts.down_proj[3]     [hidden, width]

(Mixtral calls them w1, w3 and w2.) transformers 5 converts as it loads, and back as it saves. Here `Weights` answers to
both names, and what is written has those of the files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

EXPERT = re.compile(r"(?P<path>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
"""The name of a matrix of one expert."""
PLACES = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
}  # fmt: skip
"""Matrix → the parameter that holds it, and its place among those of one expert."""
MIXTURES = (r"re:.*\.experts\b.*", r"re:.*\.(gate|router)$")
"""Patterns of module names, as compressed-tensors has them, for experts and routers."""
Stacks = Mapping[str, tuple[tuple[str, ...], ...]]
"""Parameter of a module → for each expert the tensors whose rows it holds, one below the other."""


def stacks(names: Iterable[str]) -> Stacks:
    """The parameters that hold what these tensors hold, of those that are experts' matrices."""
    found: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        part = EXPERT.fullmatch(name)
        if part and part["matrix"] in PLACES:
            parameter, place = PLACES[part["matrix"]]
            found[f"{part['path']}.{parameter}"][int(part["number"])][place] = name
    return {
        parameter: tuple(
            tuple(matrices[place] for place in sorted(matrices)) for _, matrices in sorted(experts.items())
        )
        for parameter, experts in found.items()
    }


def stacked(matrices: Iterable[Tensor], shape: tuple[int, ...]) -> Float[Tensor, "experts rows in"]:
    """Matrices [rows, in] as one tensor; each is let go before the next is asked for."""
    whole: Tensor | None = None
    row = 0
    for matrix in matrices:
        whole = matrix.new_empty(shape) if whole is None else whole
        whole.view(-1, shape[-1])[row : row + len(matrix)] = matrix
        row += len(matrix)
    assert whole is not None, "a stack holds something"
    return whole


def taken_apart(tensors: Mapping[str, Tensor], stacks: Stacks) -> dict[str, Float[Tensor, "rows in"]]:
    """What the stacks among these tensors hold, by the names of files."""
    found: dict[str, Tensor] = {}
    for parameter, experts in stacks.items():
        names = [name for expert in experts for name in expert]
        if parameter in tensors:
            found |= zip(names, tensors[parameter].flatten(0, 1).chunk(len(names)), strict=True)
    return found
