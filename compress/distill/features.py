"""Feature losses: one number for each token from what student and teacher compute on the way.

Hidden states. ‖x_s P - x_t‖² / E‖x_t‖², with x_s and x_t the states after a block of each. P brings the student's width
to the teacher's. It is the least-squares one, from second moments of both over calibration tokens:

    P = (E[x_s x_sᵀ] + λ I)⁻¹ E[x_s x_tᵀ]

It is found once and may be trained on from there; then it can only help (FitNets, arXiv 1412.6550, learns it from
nothing). A student of the teacher's width that began as its copy needs none: P = I says that its states are to
be the teacher's own, where the least-squares P would only ask that they can be read off. E‖x_t‖² comes from the moments
as well, not from the batch, so that gradients of several batches add up to those of one.

Value relations. How much the value vectors v of two tokens are alike, softmax(v_i · v_j / √d) over j, as a distribution
for each token i and head; the loss is KL(teacher ‖ student), a mean over heads (MiniLM, arXiv 2002.10957). Widths may
differ. So may numbers of heads: the values of all heads, side by side, are cut anew into as many as wanted (MiniLMv2,
arXiv 2012.15828). A window's relations are [heads, length, length]; they are computed window by window, and once more
in the backward pass (`torch.utils.checkpoint`), so that those of one window exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.core.linalg import inverse_cholesky

DAMPING = 1e-6
"""λ over the mean of the diagonal, to begin with: widths that no token uses make moments singular."""


@dataclass(frozen=True, eq=False)
class Projection:
    """From a student's states to its teacher's: x_t ≈ x_s P."""

    matrix: Float[Tensor, "student teacher"]
    energy: float
    """E‖x_t‖²."""


def least_squares(
    second: Float[Tensor, "student student"], cross: Float[Tensor, "student teacher"], energy: float
) -> Projection:
    """The best projection, from E[x_s x_sᵀ], E[x_s x_tᵀ] and E‖x_t‖²; computed in float64, kept in float32.

    Raises NumericalError where E[x_s x_sᵀ] is not positive semidefinite or not finite.
    """
    factor, _ = inverse_cholesky(second.double(), DAMPING)
    return Projection((factor.T @ (factor @ cross.double())).float(), energy)


def hidden_losses(
    student: Float[Tensor, "*tokens student"], teacher: Float[Tensor, "*tokens teacher"], projection: Projection
) -> Float[Tensor, "*tokens"]:
    """‖x_s P - x_t‖² / E‖x_t‖² of every token, in float32. Raises ValueError where there is no energy."""
    if not projection.energy > 0:
        raise ValueError(f"the teacher's states have energy {projection.energy}; there is nothing to learn from them")
    error = student.float() @ projection.matrix - teacher.detach().float()
    return error.square().sum(dim=-1) / projection.energy


def uniform_layers(num_student: int, num_teacher: int) -> tuple[int, ...]:
    """For each block of the student the teacher's at the same depth, relative to all; the last goes with the last.

    Raises ValueError where the teacher has fewer.
    """
    if not 0 < num_student <= num_teacher:
        raise ValueError(f"{num_student} blocks cannot be laid out evenly over a teacher's {num_teacher}")
    return tuple(
        (2 * num_teacher * block + num_student) // (2 * num_student) - 1 for block in range(1, num_student + 1)
    )


def relation_losses(
    student: Float[Tensor, "windows length student"],
    teacher: Float[Tensor, "windows length teacher"],
    valid: Bool[Tensor, "windows length"],
    heads: int,
) -> Float[Tensor, "windows length"]:
    """KL between value relations for every token, a mean over `heads`; tokens that are not valid are nobody's kin.

    Values are those of all heads, side by side. Raises ValueError where `heads` does not divide both widths.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if heads < 1 or any(width % heads for width in widths):
        raise ValueError(f"relation_heads={heads} must divide the widths of values, {widths[0]} and {widths[1]}")
    windows = zip(student, teacher.detach(), valid, strict=True)
    return torch.stack([checkpoint(_relation_losses, *window, heads, use_reentrant=False) for window in windows])


def _relation_losses(
    student: Float[Tensor, "length student"],
    teacher: Float[Tensor, "length teacher"],
    valid: Bool[Tensor, " length"],
    heads: int,
) -> Float[Tensor, " length"]:
    log_q, log_p = _log_relations(student, valid, heads), _log_relations(teacher, valid, heads)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).mean(dim=0)


def _log_relations(
    values: Float[Tensor, "length width"], valid: Bool[Tensor, " length"], heads: int
) -> Float[Tensor, "heads length length"]:
    by_head = values.float().unflatten(-1, (heads, -1)).transpose(0, 1)
    alike = by_head @ by_head.mT / by_head.shape[-1] ** 0.5
    # Not -∞: a window without any valid token would be all NaN, and so would its gradient be.
    return F.log_softmax(alike.masked_fill(~valid, torch.finfo(alike.dtype).min), dim=-1)
