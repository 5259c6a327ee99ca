"""The objective: a weighted sum of what the parts say, and what it needs for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from compress.distill.divergences import JensenShannon
from compress.distill.features import Projection, hidden_losses, relation_losses
from compress.distill.losses import TopK, mean_over_valid, token_losses
from compress.distill.objective import Objective, Outputs
from compress.distill.teacher_cache import top_k

WINDOWS, LENGTH, VOCABULARY = 3, 5, 11
ALL = Objective("jsd", 2.0, 0.3, divergence=1.0, cross_entropy=0.5, hidden=2.0, relations=0.25, relation_heads=2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(seed: int, width: int, grad: bool = False) -> Outputs:
    shapes = ((VOCABULARY,), (width,), (width,), (width,))
    logits, first, second, values = (
        normal(seed + index, WINDOWS, LENGTH, *shape).requires_grad_(grad) for index, shape in enumerate(shapes)
    )
    return Outputs(logits, (first, second), values)


def batch() -> dict[str, Any]:
    targets = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    projections = [Projection(normal(seed, 4, 6), 5.0) for seed in (20, 21)]
    return {"valid": valid, "targets": targets, "projections": projections}


def test_the_whole_is_the_weighted_sum_of_means_over_valid_tokens() -> None:
    student, teacher, given = outputs(0, 4), outputs(10, 6), batch()
    loss = ALL.loss(student, teacher, **given)
    valid, projections = given["valid"], given["projections"]
    assert student.values is not None
    assert teacher.values is not None
    hidden = [hidden_losses(*each) for each in zip(student.hidden, teacher.hidden, projections, strict=True)]
    parts = {
        "divergence": token_losses(student.logits, teacher.logits, JensenShannon(0.3), 2.0)[valid].mean(),
        "cross_entropy": F.cross_entropy(student.logits[valid], given["targets"][valid]),
        "hidden": (hidden[0] + hidden[1])[valid].mean() / 2,
        "relations": relation_losses(student.values, teacher.values, valid, 2)[valid].mean(),
    }
    assert_close(loss.parts, parts)
    assert_close(loss.total, sum(weight * parts[name] for name, weight in weights(ALL).items()))


def weights(objective: Objective) -> dict[str, float]:
    return {name: getattr(objective, name) for name in ("divergence", "cross_entropy", "hidden", "relations")}


def test_every_part_has_a_gradient_and_what_is_reported_has_none() -> None:
    student = outputs(0, 4, grad=True)
    loss = ALL.loss(student, outputs(10, 6), **batch())
    loss.total.backward()
    assert student.values is not None
    for leaf in (student.logits, *student.hidden, student.values):
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0
    assert not any(part.requires_grad for part in loss.parts.values())


def test_losses_of_batches_with_the_count_of_all_add_up() -> None:
    student, teacher, given = outputs(0, 4), outputs(10, 6), batch()
    whole = ALL.loss(student, teacher, **given).total

    def window(outputs: Outputs, index: int) -> Outputs:
        assert outputs.values is not None
        part = slice(index, index + 1)
        return Outputs(outputs.logits[part], [x[part] for x in outputs.hidden], outputs.values[part])

    total = sum(
        ALL.loss(
            window(student, index),
            window(teacher, index),
            given["valid"][index : index + 1],
            count=8,
            targets=given["targets"][index : index + 1],
            projections=given["projections"],
        ).total
        for index in range(WINDOWS)
    )
    assert_close(total, whole)


def test_a_part_without_weight_is_neither_computed_nor_asked_for() -> None:
    student, teacher = Outputs(normal(0, WINDOWS, LENGTH, VOCABULARY)), Outputs(normal(1, WINDOWS, LENGTH, VOCABULARY))
    valid = batch()["valid"]
    loss = Objective().loss(student, teacher, valid)
    kl = F.kl_div(student.logits.log_softmax(-1), teacher.logits.log_softmax(-1), reduction="none", log_target=True)
    assert list(loss.parts) == ["divergence"]
    assert_close(loss.total, kl.sum(-1)[valid].mean())


def test_a_cached_teacher_takes_the_place_of_one_in_memory() -> None:
    student, teacher, given = outputs(0, 4), outputs(10, 6), batch()
    objective = Objective("reverse_kl", 2.0, cross_entropy=0.5)
    cached = top_k(teacher.logits, VOCABULARY, 2.0)
    found = objective.loss(student, cached, given["valid"], targets=given["targets"])
    assert_close(found.total, objective.loss(student, teacher, given["valid"], targets=given["targets"]).total)
    cut = objective.loss(student, top_k(teacher.logits, 4, 2.0), given["valid"], targets=given["targets"])
    assert cut.total < found.total


def test_cross_entropy_alone_needs_no_teacher() -> None:
    student, given = outputs(0, 4), batch()
    loss = Objective(divergence=0, cross_entropy=1).loss(student, None, given["valid"], targets=given["targets"])
    assert_close(loss.total, F.cross_entropy(student.logits[given["valid"]], given["targets"][given["valid"]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "divergence=1 needs a teacher"),
        ({"teacher": "cached", "temperature": 1.0}, "temperature=1; cache it again"),
        ({"teacher": "cached"}, "hidden needs .* a cached teacher, which has probabilities only"),
        ({"teacher": "cached", "hidden": 0.0}, "relations needs .* a cached teacher"),
        ({"teacher": None, "divergence": 0.0}, "hidden needs .* there is no teacher"),
        ({"targets": None}, "cross_entropy=0.5 needs targets"),
        ({"projections": []}, "a projection for each: there are 2, 2 and 0"),
        ({"values": None}, "relations=0.25 needs the values"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, Any], message: str) -> None:
    student, teacher, given = outputs(0, 4), outputs(10, 6), batch()
    source: Outputs | TopK | None = teacher
    if "teacher" in change:
        source = top_k(teacher.logits, 4, 2.0) if change.pop("teacher") else None
    if "values" in change:
        student = replace(student, values=change.pop("values"))
    given |= {name: change.pop(name) for name in ("targets", "projections") if name in change}
    with pytest.raises(ValueError, match=message):
        replace(ALL, **change).loss(student, source, **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "kl"}, "kind='kl' must be one of"),
        ({"mixture": 0.5}, "says nothing about kind forward_kl"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"hidden": -1.0}, "hidden=-1.0 is a weight"),
        ({"divergence": 0.0}, "nothing to train on"),
        ({"relations": 1.0}, "relation_heads goes with relations"),
        ({"relation_heads": 4}, "relation_heads goes with relations"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


def test_the_mean_is_that_of_mean_over_valid() -> None:
    student, teacher, given = outputs(0, 4), outputs(10, 6), batch()
    objective = Objective("jsd", 2.0, 0.3)
    losses = token_losses(student.logits, teacher.logits, JensenShannon(0.3), 2.0)
    assert torch.equal(
        objective.loss(student, teacher, given["valid"], count=20).total, mean_over_valid(losses, given["valid"], 20)
    )
