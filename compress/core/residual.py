"""Pruning the residual stream: which of its coordinates a model does without, as they are or after a turn.

As they are (Minitron, arXiv 2407.14679): a coordinate counts by how large it is behind the norms that read the stream.
All blocks add to one stream, so one set is kept for all of them:

    score_j = Σ over norms  mean over positions t of  (Σ over sequences b  y_btj²)^½.

After a turn (SliceGPT, arXiv 2401.15024): once the weights of the norms have moved into the layers behind them, the
stream may be turned by any orthogonal Q, and that of the eigenvectors of M = E[x xᵀ] puts as much energy as can be into
its leading coordinates. SliceGPT has a Q for each block and multiplies the skip connections by QᵀQ′, which plain
checkpoints cannot express; ours is one for all, of the mean of the M of all places that read the stream.

A norm divides by the root mean square over its coordinates. When k of n are left and carry almost all of the length,
that has grown by √(n/k), which the weight of the norm has to make up for, and its ε by the square of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError


@dataclass(frozen=True, eq=False)
class Activity:
    """How large the coordinates behind one norm are at each position, summed over sequences."""

    squares: Float[Tensor, "positions n"]
    """Σ_b y_btj², float64."""
    num_sequences: int
    num_dropped: int = 0
    """Sequences left out because they held a NaN or an infinity."""

    @staticmethod
    def of(outputs: Float[Tensor, "sequences positions n"]) -> Activity:
        """The activity of a batch."""
        y = outputs.double()
        finite = y.isfinite().all(dim=(1, 2))
        return Activity(y[finite].square().sum(dim=0), int(finite.sum()), int((~finite).sum()))

    def including(self, outputs: Float[Tensor, "sequences positions n"]) -> Activity:
        """This activity with another batch, of sequences of the same length."""
        if outputs.shape[1:] != self.squares.shape:
            raise ValueError(f"sequences {list(outputs.shape[1:])} among sequences {list(self.squares.shape)}")
        more = Activity.of(outputs)
        return Activity(
            self.squares + more.squares,
            self.num_sequences + more.num_sequences,
            self.num_dropped + more.num_dropped,
        )


def hidden_scores(norms: Sequence[Activity]) -> Float[Tensor, " n"]:
    """Minitron's scores of the coordinates of the residual stream; `norms`: of all that read it.

    Raises NumericalError where a norm saw no usable sequence.
    """
    for place, norm in enumerate(norms):
        if not norm.num_sequences:
            raise NumericalError(
                f"norm {place} of {len(norms)}: no usable sequence; {norm.num_dropped} held NaN or infinite outputs"
            )
    return torch.stack([norm.squares.sqrt().mean(dim=0) for norm in norms]).sum(dim=0)


def principal_basis(moment: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Q, whose first k columns span what keeps most of E‖x‖² in k coordinates of x Q, and the energy in each, falling.

    `moment`: E[x xᵀ]. Orthogonal, float64; of each column the largest entry is positive. A space of one energy is
    spanned in no particular way. Raises NumericalError where a number is not finite.
    """
    if not moment.isfinite().all():
        count = int((~moment.isfinite()).sum())
        raise NumericalError(f"{count} of {moment.numel()} numbers of the moment are not finite")
    M = moment.double()
    energy, Q = torch.linalg.eigh((M + M.T) / 2)
    energy, Q = energy.flip(0).clamp(min=0), Q.flip(1)
    largest = Q.gather(0, Q.abs().argmax(dim=0, keepdim=True))
    return Q * largest.sign(), energy


def norm_gain(size: int, kept: int) -> float:
    """By what the weight of an RMSNorm over `size` coordinates is to be multiplied once it is over `kept` of them."""
    return math.sqrt(size / kept)
