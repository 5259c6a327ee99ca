"""The stage `shape`: which shapes there are within a budget, and which of them are worth a try."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from compress.errors import RecipeError
from compress.models import anatomy_for
from compress.models.headers import read_folder
from compress.pipeline import prepare
from compress.plan import Plan, make_plan
from compress.prune.shape import Choice, Shape, best, predicted, tightest
from compress.recipe import Recipe, parse

REMOVED, FFN, HEADS = (0, 1, 2, 3), (1.0, 0.75, 0.5), (1.0, 0.5)
SHARES = {
    Choice(k, ffn, heads): 0.2 + 0.8 * (1 - k / 8) * (0.7 * ffn + 0.3 * heads)
    for k, ffn, heads in product(REMOVED, FFN, HEADS)
}


def costs(seed: int) -> dict[Choice, float]:
    """Of each choice alone: random, and more for what takes more."""
    generator = torch.Generator().manual_seed(seed)

    def rising(count: int) -> list[float]:
        return torch.rand(count, generator=generator).cumsum(0).tolist()

    alone = dict(zip((Choice(removed=k) for k in REMOVED[1:]), rising(3), strict=True))
    alone |= zip((Choice(ffn=ffn) for ffn in FFN[1:]), rising(2), strict=True)
    return alone | {Choice(heads=0.5): rising(1)[0]}


def planned(tiny: Path, stages: str) -> Plan:
    return prepare(parse(f"stages:\n{stages}", "x.yaml"), model=str(tiny))


@pytest.mark.parametrize("seed", range(8))
def test_the_first_choice_is_the_best_of_all_within_the_budget(seed: int) -> None:
    alone = costs(seed)
    for budget in (0.95, 0.8, 0.7, 0.55, 0.5):
        (first, *_) = best(tightest(SHARES, budget), alone, 3)
        within = [choice for choice, share in SHARES.items() if share <= budget]
        assert predicted(first, alone) == min(predicted(choice, alone) for choice in within)


@pytest.mark.parametrize("seed", range(8))
def test_a_larger_budget_never_costs_more(seed: int) -> None:
    alone = costs(seed)
    budgets = [0.45 + 0.05 * step for step in range(11)]
    found = [predicted(best(tightest(SHARES, budget), alone, 1)[0], alone) for budget in budgets]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_what_could_give_something_back_is_no_candidate() -> None:
    assert tightest(SHARES, 0.9) == [Choice(0, 1.0, 0.5), Choice(0, 0.75, 1.0), Choice(1, 1.0, 1.0)]
    assert tightest(SHARES, 0.4) == []


def test_a_choice_is_its_parts_and_its_stages() -> None:
    choice = Choice(2, 0.75, 0.5)
    assert choice.parts == (Choice(removed=2), Choice(ffn=0.75), Choice(heads=0.5))
    assert [stage.name for stage in choice.stages(12)] == ["depth", "width"]
    assert [stage.name for stage in Choice(ffn=0.75).stages(12)] == ["width"]
    assert Choice().parts == ()


def test_the_headers_say_what_each_shape_comes_to(tiny: Path) -> None:
    folder = read_folder(tiny)
    anatomy = anatomy_for(folder.config, folder.shapes)
    for shape in (Shape(parameters=0.8, heads=(1.0, 0.5)), Shape(bytes=0.8, heads=(1.0, 0.5))):
        shares = shape.shares(folder, anatomy)
        for choice in (Choice(removed=1), Choice(ffn=0.5), Choice(1, 0.75, 0.5)):
            plan = make_plan(Recipe("x", choice.stages(4)), folder)
            assert shares[choice] == pytest.approx(plan.parameters_after / plan.parameters_before, abs=1e-12)


def test_an_embedding_that_is_looked_up_takes_no_time(tiny: Path) -> None:
    folder = read_folder(tiny)
    anatomy = anatomy_for(folder.config, folder.shapes)
    embedding = folder.tensors["model.embed_tokens.weight"].nbytes
    by_bytes, by_time = (
        shape.shares(folder, anatomy)[Choice(removed=1)] for shape in (Shape(bytes=0.8), Shape(latency=0.8))
    )
    total = sum(header.nbytes for header in folder.tensors.values())
    assert (1 - by_time) * (total - embedding) == pytest.approx((1 - by_bytes) * total)


def test_a_plan_shows_the_largest_shape_and_says_that_it_is_open(tiny: Path) -> None:
    plan = planned(tiny, "  - shape: {parameters: 0.8}\n  - rtn: {scheme: w4a16, group_size: 32}\n")
    assert [stage.name for stage in plan.recipe.stages] == ["width", "rtn"]
    assert plan.parameters_after < 0.8 * plan.parameters_before
    assert "within 80.0% of the parameters; a plan shows the largest: remove 0, ffn 0.5, heads 1" in plan.notes[-1]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("{}", "no budget is given: set one of parameters, bytes, latency to a share of the original's, as 0.7"),
        ("{parameters: 0.7, bytes: 0.7}", "parameters and bytes are given: set one of"),
        ("{latency: 1.0}", "latency=1.0 must be the share that may stay, above 0 and below 1"),
        ("{bytes: 0.7, ffn: [1.0, 0.0]}", "ffn=[1.0, 0.0] must be shares that stay, above 0 and at most 1"),
        ("{bytes: 0.7, heads: []}", "heads=[] must be shares that stay"),
        ("{bytes: 0.7, max_removed: -1}", "max_removed=-1 must be at least 0"),
        ("{bytes: 0.7, candidates: 0}", "candidates=0 must be at least 1"),
        ("{bytes: 0.7, samples: 1}", "samples=1 must be at least 2"),
        (
            "{parameters: 0.5}",
            "parameters=0.5 cannot be reached: the smallest shape, remove 1, ffn 0.5, heads 1, comes to 0.573",
        ),
        ("{parameters: 0.7, max_removed: 0}", "the smallest shape, remove 0, ffn 0.5, heads 1, comes to 0.745"),
    ],
)
def test_what_cannot_be_is_refused(fields: str, told: str, tiny: Path) -> None:
    with pytest.raises(RecipeError, match="x.yaml:2:") as caught:
        planned(tiny, f"  - shape: {fields}\n")
    assert told in str(caught.value)


def test_a_model_without_predictions_is_refused(tiny: Path) -> None:
    folder = read_folder(tiny)
    anatomy = replace(anatomy_for(folder.config, folder.shapes), head=None)
    assert Shape(parameters=0.8).problems(folder, anatomy) == [
        "the model has no head whose predictions could diverge. Use depth or width"
    ]


def test_a_shape_comes_first(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="x.yaml:3:.*shape stands for the first stages; put it first"):
        planned(tiny, "  - width: {ffn: 0.75}\n  - shape: {parameters: 0.8}\n")


def test_what_a_later_stage_has_against_any_shape_is_said_where_that_stage_is(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="x.yaml:3:.*in_features=96 is not a multiple of group_size=64"):
        planned(tiny, "  - shape: {parameters: 0.9}\n  - rtn: {scheme: w4a16, group_size: 64}\n")
