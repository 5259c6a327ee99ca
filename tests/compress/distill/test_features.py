"""Feature losses: what P is best at, which block goes with which, and relations by their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.distill.features import Projection, hidden_losses, least_squares, relation_losses, uniform_layers
from compress.errors import NumericalError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(tokens: int = 500) -> tuple[Tensor, Tensor]:
    """A student of width 6, a teacher of width 9 that is only partly a function of it."""
    student = normal(0, tokens, 6) @ normal(1, 6, 6)
    return student, student @ normal(2, 6, 9) + normal(3, tokens, 9)


def best(student: Tensor, teacher: Tensor) -> Projection:
    count = len(student)
    energy = float(teacher.square().sum() / count)
    return least_squares(student.T @ student / count, student.T @ teacher / count, energy)


def test_the_projection_is_that_of_least_squares_on_the_tokens_themselves() -> None:
    student, teacher = states()
    wanted = torch.linalg.lstsq(student.double(), teacher.double()).solution
    assert_close(best(student, teacher).matrix, wanted.float(), atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_share_of_the_teacher_s_energy_that_is_missed() -> None:
    student, teacher = states()
    projection = best(student, teacher)
    losses = hidden_losses(student, teacher, projection)
    missed = (student @ projection.matrix - teacher).square().sum() / teacher.square().sum()
    assert float(losses.mean()) == pytest.approx(float(missed), rel=1e-4)
    nothing = Projection(torch.zeros(6, 9), projection.energy)
    assert float(hidden_losses(student, teacher, nothing).mean()) == pytest.approx(1, rel=1e-4)


def test_no_projection_nearby_is_better() -> None:
    student, teacher = states()
    projection = best(student, teacher)
    least = float(hidden_losses(student, teacher, projection).mean())
    for seed in range(10):
        other = Projection(projection.matrix + 0.05 * normal(seed, 6, 9), projection.energy)
        assert float(hidden_losses(student, teacher, other).mean()) > least


def test_a_width_that_no_token_uses_does_not_stand_in_the_way() -> None:
    student, teacher = states()
    student[:, 2] = 0
    projection = best(student, teacher)
    assert projection.matrix.isfinite().all()
    assert (projection.matrix[2] == 0).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="6 inputs is not positive definite"):
        least_squares(torch.full((6, 6), torch.nan), torch.ones(6, 9), 1.0)


def test_states_without_energy_are_refused() -> None:
    with pytest.raises(ValueError, match="energy 0"):
        hidden_losses(torch.ones(2, 3), torch.zeros(2, 3), Projection(torch.eye(3), 0))


def test_gradients_reach_the_student_and_the_projection_and_not_the_teacher() -> None:
    student, teacher = (x.double().requires_grad_() for x in states(5))
    matrix = normal(4, 6, 9).requires_grad_()
    hidden_losses(student.float(), teacher.float(), Projection(matrix, 3.0)).sum().backward()
    error = student.float() @ matrix - teacher.float()
    assert_close(student.grad, (2 / 3 * error @ matrix.T).double().detach())
    assert_close(matrix.grad, (2 / 3 * student.float().T @ error).detach())
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "wanted"),
    [
        (1, 1, (0,)),
        (4, 4, (0, 1, 2, 3)),
        (3, 6, (1, 3, 5)),
        (4, 6, (1, 2, 4, 5)),
        (1, 12, (11,)),
        (5, 6, (0, 1, 3, 4, 5)),
    ],
)
def test_layers_are_laid_out_evenly_and_the_last_goes_with_the_last(
    num_student: int, num_teacher: int, wanted: tuple[int, ...]
) -> None:
    assert uniform_layers(num_student, num_teacher) == wanted


def test_every_layout_is_rising_and_within_half_a_block_of_its_depth() -> None:
    for num_teacher in range(1, 40):
        for num_student in range(1, num_teacher + 1):
            blocks = uniform_layers(num_student, num_teacher)
            assert sorted(set(blocks)) == list(blocks)
            for index, block in enumerate(blocks):
                assert abs((block + 1) - (index + 1) * num_teacher / num_student) <= 0.5


def test_a_teacher_with_fewer_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="7 blocks .* a teacher's 6"):
        uniform_layers(7, 6)


def relations(values: Tensor, heads: int, valid: Tensor) -> Tensor:
    """Of one window, entry by entry."""
    length, width = values.shape
    size = width // heads
    result = torch.zeros(heads, length, length)
    for head in range(heads):
        v = values[:, head * size : (head + 1) * size]
        for i in range(length):
            weights = torch.stack([(v[i] @ v[j] / size**0.5).exp() * valid[j] for j in range(length)])
            result[head, i] = weights / weights.sum()
    return result


def test_relations_are_compared_as_the_definition_says_whatever_the_widths() -> None:
    student, teacher = normal(0, 2, 5, 8), normal(1, 2, 5, 12)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    losses = relation_losses(student, teacher, valid, 2)
    for window in range(2):
        q, p = (relations(x[window], 2, valid[window]) for x in (student, teacher))
        wanted = torch.special.xlogy(p, p / q.clamp(min=1e-30)).sum(-1).mean(0)
        assert_close(losses[window][valid[window]], wanted[valid[window]])


def test_tokens_that_are_not_valid_have_no_part_in_relations_and_get_no_gradient() -> None:
    student, teacher = normal(0, 2, 5, 8), normal(1, 2, 5, 8)
    valid = torch.tensor([[True, True, False, True, False], [False] * 5])
    results = []
    for value in (0.0, 1e4):
        student[~valid] = teacher[~valid] = value
        leaf = student.clone().requires_grad_()
        losses = relation_losses(leaf, teacher, valid, 2)
        (gradient,) = torch.autograd.grad(losses[valid].sum(), leaf)
        results.append((losses[valid].detach(), gradient))
    assert_close(results[1], results[0])
    assert (results[1][1][~valid] == 0).all()
    assert results[1][1][valid].abs().sum() > 0


def test_relations_do_not_change_when_values_are_rotated_within_their_heads() -> None:
    values, valid = normal(0, 1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    rotation = torch.linalg.qr(normal(1, 4, 4)).Q
    turned = (values.unflatten(-1, (2, 4)) @ rotation).flatten(-2)
    assert relation_losses(turned, values, valid, 2).abs().max() < 1e-6
    assert relation_losses(turned, values, valid, 4).abs().max() > 1e-3


def test_gradients_of_relations_are_those_of_the_graph_that_is_not_kept() -> None:
    student, teacher = normal(0, 1, 5, 8).requires_grad_(), normal(1, 1, 5, 8)
    valid = torch.ones(1, 5, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(relation_losses(student, teacher, valid, 2).sum(), student)
    q, p = (relations(x[0], 2, valid[0]) for x in (student, teacher))
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum() / 2, student)
    assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_values_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=f"relation_heads={heads} must divide the widths of values, 8 and 12"):
        relation_losses(normal(0, 1, 5, 8), normal(1, 1, 5, 12), torch.ones(1, 5, dtype=torch.bool), heads)
