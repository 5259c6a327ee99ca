"""Token losses: the plain formula, in pieces, with the gradients of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from compress.distill.divergences import MIXED, PLAIN, ForwardKL, JensenShannon, ReverseKL, divergence_of
from compress.distill.losses import TopK, cross_entropy, mean_over_valid, token_losses
from compress.distill.teacher_cache import top_k

KINDS = [*PLAIN, *MIXED]
VOCABULARY = 11


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


def plain(student: Tensor, teacher: Tensor | TopK, kind: str, temperature: float) -> Tensor:
    """The loss as it is defined: whole, with a graph, the tail as 1 minus the rest."""
    q = (student / temperature).softmax(-1)
    if isinstance(teacher, TopK):
        kept = q.gather(-1, teacher.indices)
        q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)
        p = teacher.log_probs.to(q.dtype).exp()
    else:
        p = (teacher / temperature).softmax(-1)
    return temperature**2 * divergence_of(kind).terms(p.log(), q.log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_the_divergence_at_that_temperature_times_its_square(kind: str, temperature: float) -> None:
    student, teacher = logits(0, 2, 5), logits(1, 2, 5)
    cut = top_k(teacher, 4, temperature)
    divergence = divergence_of(kind)
    assert_close(token_losses(student, teacher, divergence, temperature), plain(student, teacher, kind, temperature))
    assert_close(token_losses(student, cut, divergence, temperature), plain(student, cut, kind, temperature))


@pytest.mark.parametrize("k", [None, 1, 4, VOCABULARY])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, k: int | None) -> None:
    student, teacher = logits(0, 4, dtype=torch.float64).requires_grad_(), logits(1, 4, dtype=torch.float64)
    beliefs = teacher if k is None else top_k(teacher, k, 2.0)

    def loss(student: Tensor) -> Tensor:
        return token_losses(student, beliefs, divergence_of(kind), 2.0, chunk_bytes=3 * 4 * VOCABULARY)

    assert torch.autograd.gradcheck(loss, student)


def test_gradients_of_forward_kl_are_those_of_the_plain_formula_and_reach_the_student_only() -> None:
    student, teacher = logits(0, 2, 5).requires_grad_(), logits(1, 2, 5).requires_grad_()
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    (token_losses(student, teacher, ForwardKL(), 2.0) * weights).sum().backward()
    kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="none", log_target=True)
    (wanted,) = torch.autograd.grad((4 * kl.sum(-1) * weights).sum(), student)
    assert_close(student.grad, wanted)
    assert teacher.grad is None


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_chunk_makes_no_difference_beyond_the_last_digit(kind: str, k: int | None) -> None:
    """exp and log of a vector's last elements are computed by other code than those before, an ulp apart."""
    student, teacher = logits(0, 7).requires_grad_(), logits(1, 7)
    beliefs = teacher if k is None else top_k(teacher, k)
    results = []
    for tokens in (1, 3, 7, 100):
        losses = token_losses(student, beliefs, divergence_of(kind), chunk_bytes=4 * VOCABULARY * tokens)
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        results.append((losses.detach(), gradient))
    for losses, gradient in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=8 * EPS, atol=8 * EPS)
        torch.testing.assert_close(gradient, results[0][1], rtol=8 * EPS, atol=8 * EPS)


def test_logits_in_bfloat16_are_computed_with_in_float32_and_get_gradients_of_their_own_type() -> None:
    student, teacher = logits(0, 5).bfloat16().requires_grad_(), logits(1, 5).bfloat16()
    losses = token_losses(student, teacher, ForwardKL())
    assert torch.equal(losses, token_losses(student.float(), teacher.float(), ForwardKL()))
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    wide = student.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(token_losses(wide, teacher.float(), ForwardKL()).sum(), wide)
    assert torch.equal(gradient, wanted.bfloat16())


def test_huge_logits_and_logits_of_minus_infinity_give_finite_losses_and_gradients() -> None:
    student, teacher = 1e4 * logits(0, 5), 1e4 * logits(1, 5)
    student[:, -2:] = teacher[:, -2:] = -torch.inf
    student.requires_grad_()
    for beliefs in (teacher, top_k(teacher, 3)):
        for kind in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
            losses = token_losses(student, beliefs, divergence_of(kind))
            (gradient,) = torch.autograd.grad(losses.sum(), student)
            assert losses.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_cut_after_its_whole_vocabulary_gives_the_loss_of_the_whole(kind: str) -> None:
    student, teacher = logits(0, 2, 5).requires_grad_(), logits(1, 2, 5)
    results = [
        token_losses(student, beliefs, divergence_of(kind), 2.0) for beliefs in (teacher, top_k(teacher, VOCABULARY, 2))
    ]
    assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(losses.sum(), student)[0] for losses in results]
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_more_tokens_a_teacher_is_cut_after_the_more_of_the_loss_is_seen(kind: str) -> None:
    student, teacher = logits(0, 50), logits(1, 50)
    losses = [token_losses(student, top_k(teacher, k), divergence_of(kind)) for k in range(1, VOCABULARY + 1)]
    losses.append(token_losses(student, teacher, divergence_of(kind)))
    seen = torch.stack(losses)
    assert (seen.diff(dim=0) > -1e-6).all()
    assert seen[0].mean() < 0.9 * seen[-1].mean()


def test_what_a_cut_forward_kl_lacks_is_the_divergence_within_the_tail() -> None:
    student, teacher = logits(0, 50), logits(1, 50)
    cut = top_k(teacher, 4)
    tail = torch.ones(50, VOCABULARY).scatter(-1, cut.indices, 0).bool()
    p_tail, q_tail = (x.masked_fill(~tail, -torch.inf).log_softmax(-1) for x in (teacher, student))
    within = ForwardKL().terms(p_tail, q_tail).sum(-1)
    lacking = token_losses(student, teacher, ForwardKL()) - token_losses(student, cut, ForwardKL())
    assert_close(lacking, cut.log_probs[:, -1].exp() * within, atol=1e-6, rtol=1e-4)


def test_cross_entropy_is_torch_s_and_so_is_its_gradient() -> None:
    student = logits(0, 2, 5).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    losses = cross_entropy(student, targets, chunk_bytes=3 * 4 * VOCABULARY)
    wanted = F.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    assert_close(losses, wanted)
    (gradient,), (plain_gradient,) = (torch.autograd.grad(each.sum(), student) for each in (losses, wanted))
    assert_close(gradient, plain_gradient)


def test_cross_entropy_of_labels_to_ignore_is_torch_s_once_they_are_not_valid() -> None:
    student = logits(0, 10).requires_grad_()
    targets = torch.randint(VOCABULARY, (10,), generator=torch.Generator().manual_seed(1))
    targets[::3] = -100
    assert_close(mean_over_valid(cross_entropy(student, targets), targets >= 0), F.cross_entropy(student, targets))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_what_tokens_hold_that_are_not_valid_changes_neither_loss_nor_gradient(garbage: float) -> None:
    valid = torch.tensor([True, False, True, True, False])
    student, teacher = logits(0, 5), logits(1, 5)
    results = []
    for value in (0.0, garbage):
        student[~valid] = teacher[~valid] = value
        leaf = student.clone().requires_grad_()
        loss = mean_over_valid(token_losses(leaf, teacher, JensenShannon()), valid)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][~valid] == 0).all()


def test_gradients_of_batches_divided_by_the_count_of_all_add_up_to_those_of_one() -> None:
    student, teacher = logits(0, 6, 5).requires_grad_(), logits(1, 6, 5)
    valid = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < torch.linspace(0.1, 1, 6).unsqueeze(1)
    whole = mean_over_valid(token_losses(student, teacher, ForwardKL()), valid)
    (wanted,) = torch.autograd.grad(whole, student)
    count = int(valid.sum())
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        mean_over_valid(token_losses(student[part], teacher[part], ForwardKL()), valid[part], count).backward()
    assert_close(student.grad, wanted)


def test_a_batch_without_valid_tokens_has_loss_zero() -> None:
    student = logits(0, 5).requires_grad_()
    loss = mean_over_valid(token_losses(student, logits(1, 5), ForwardKL()), torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_descent_on_a_cut_teacher_brings_the_student_to_its_top_and_its_tail() -> None:
    student, cut = logits(0, 3).requires_grad_(), top_k(logits(1, 3), 4)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(token_losses(student, cut, ForwardKL()).sum(), student)
        student = (student - 4 * gradient).detach().requires_grad_()
    q = student.detach().softmax(-1)
    top = q.gather(-1, cut.indices)
    found = torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)
    assert_close(found, cut.log_probs.exp(), atol=1e-3, rtol=0)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="logits \\[2, 11\\] do not fit a teacher's \\[2, 10\\]"):
        token_losses(logits(0, 2), logits(1, 2)[:, :10], ForwardKL())
    with pytest.raises(ValueError, match="do not fit a teacher's \\[3, 5\\]"):
        token_losses(logits(0, 2), top_k(logits(1, 3), 4), ForwardKL())
    with pytest.raises(ValueError, match="of temperature 2, .* temperature=1; cache it again"):
        token_losses(logits(0, 2), top_k(logits(1, 2), 4, 2.0), ForwardKL())


def peak_bytes(run: Callable[[], Any], trace: Path) -> int:
    """The most bytes of tensors that were held beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(event["Total Allocated"] for event in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("k", [None, 16])
def test_six_chunks_and_the_gradient_are_all_that_is_held(kind: str, k: int | None, tmp_path: Path) -> None:
    tokens, vocabulary, chunk = 256, 512, 32 * 512 * 4
    student = torch.randn(tokens, vocabulary).bfloat16().requires_grad_()
    teacher = torch.randn(tokens, vocabulary).bfloat16()
    beliefs = teacher if k is None else top_k(teacher, k)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(token_losses(student, beliefs, divergence_of(kind), chunk_bytes=chunk))

    assert peak_bytes(forward, tmp_path / "forward.json") < 6.5 * chunk
    gradient = student.numel() * 2
    backward = peak_bytes(lambda: torch.autograd.grad(losses[0].sum(), student), tmp_path / "backward.json")
    assert gradient < backward < gradient + 6.5 * chunk
    if kind == "reverse_kl" and k is None:

        def whole() -> None:
            log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
            torch.autograd.grad(ReverseKL().terms(log_p, log_q).sum(), student)

        assert peak_bytes(whole, tmp_path / "whole.json") > 3 * tokens * vocabulary * 4
