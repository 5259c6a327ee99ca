"""Blocks that change little score little; measured one at a time, removals come close to the best set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core.depth import Turn, greedy, least_influential, nearest_window
from compress.errors import NumericalError

STRENGTH = 0.2
"""Of the interactions of `synthetic` blocks."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, angle: float) -> Tensor:
    """Every vector by one angle, and to another length."""
    direction = normal(*x.shape, seed=9)
    across = direction - (direction * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x
    across = across / across.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    return 3 * (math.cos(angle) * x + math.sin(angle) * across)


@pytest.mark.parametrize("angle", [0.0, 1e-5, 1e-3, 0.1, 1.0, math.pi / 2, 3.0, math.pi])
def test_influence_and_angle_are_those_of_the_turn_down_to_the_smallest(angle: float) -> None:
    x = normal(4, 50, 64)
    turn = Turn().including(x, turned(x, angle))
    assert turn.num_tokens == 200
    assert turn.influence == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=0.02, abs=1e-13)
    assert turn.angular_distance == pytest.approx(angle / math.pi, rel=0.01, abs=1e-7)


def test_batches_add_up_to_what_they_are_together() -> None:
    x, y = normal(10, 7, 16), normal(10, 7, 16, seed=1)
    whole, parts = Turn().including(x, y), Turn()
    for before, after in zip(x.split(3), y.split(3), strict=True):
        parts = parts.including(before, after)
    assert parts.influence == pytest.approx(whole.influence, rel=1e-6)
    assert parts.angular_distance == pytest.approx(whole.angular_distance, rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    assert whole.influence == pytest.approx(1 - float(cosine.mean()), rel=1e-5)
    assert whole.angular_distance == pytest.approx(float(cosine.arccos().mean()) / math.pi, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_do_not_matter(scale: float) -> None:
    x, y = normal(50, 16), normal(50, 16, seed=1)
    assert Turn().including(scale * x, y / scale).influence == pytest.approx(Turn().including(x, y).influence, rel=1e-5)


def test_states_of_zeros_count_as_a_quarter_turn_unless_they_stay_so() -> None:
    zero, some = torch.zeros(3, 8), torch.ones(3, 8)
    for before, after in ((zero, some), (some, zero)):
        turn = Turn().including(before, after)
        assert (turn.influence, turn.angular_distance) == (1.0, 0.5)
    assert Turn().including(zero, zero).influence == 0


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    x, y = normal(10, 8).bfloat16(), normal(10, 8, seed=1).bfloat16()
    x[2, 3], y[5, 0] = torch.nan, torch.inf
    turn = Turn().including(x, y)
    rest = [0, 1, 3, 4, 6, 7, 8, 9]
    assert (turn.num_tokens, turn.num_dropped) == (8, 2)
    assert turn.influence == pytest.approx(Turn().including(x[rest], y[rest]).influence)
    with pytest.raises(NumericalError, match="no usable hidden state; 1 held NaN"):
        _ = Turn().including(x[[2]], y[[2]]).influence


# ---- by influence ------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_block_stay_however_small_their_influence() -> None:
    influence = [0.0, 0.3, 0.1, 0.2, 0.1, 0.4, 0.0]
    assert [least_influential(influence, count) for count in range(4)] == [[], [4], [2, 4], [2, 3, 4]]
    assert least_influential(influence, 5) == [1, 2, 3, 4, 5]


def test_a_window_is_the_row_of_blocks_that_turns_least() -> None:
    """Of seven blocks; those at 0 hold the first or the last."""
    assert nearest_window([0.0, 0.3, 0.2, 0.2, 0.4, 0.0], 2) == [3, 4]
    assert nearest_window([0.0, 0.3, 0.0], 5) == [1, 2, 3, 4, 5]
    assert nearest_window([0.0, 0.3, 0.2, 0.5, 0.1, 0.2, 0.0], 1) == [4]
    assert nearest_window([0.0] * 8, 0) == []


def test_blocks_that_undo_each_other_are_seen_by_windows_only() -> None:
    x = normal(100, 16)
    R = torch.linalg.qr(normal(16, 16)).Q
    states = [x, x @ R]
    for matrix in (R.T, R, R.T):
        states.append(states[-1] @ matrix)
    states += [turned(states[-1], 0.5), turned(states[-1], 0.6)]
    one = [Turn().including(*pair).angular_distance for pair in pairwise(states)]
    two = [Turn().including(*pair).angular_distance for pair in zip(states, states[2:], strict=False)]
    assert least_influential(one, 1) == [4]
    assert nearest_window(two, 2) in ([1, 2], [2, 3])
    assert two[1] < 1e-6 < 0.01 < min(one)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: least_influential([0.1] * 5, 4), ValueError, "4 of 5 blocks cannot be removed: .* remove 3 at most"),
        (lambda: least_influential([0.1], 1), ValueError, "remove 0 at most"),
        (lambda: nearest_window([0.1, 0.1], 3), ValueError, "3 of 4 blocks cannot be removed"),
        (lambda: least_influential([0.1, math.nan, 0.1], 1), NumericalError, "must be numbers"),
        (lambda: greedy([1, 2], 3, len), ValueError, "3 of 2 units cannot be removed"),
        (lambda: greedy([1, 2], 1, lambda removed: math.nan), NumericalError, "after 0 removals no other leaves"),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- by loss -----------------------------------------------------------------------------------------------------


def synthetic(blocks: int, seed: int) -> Callable[[tuple[int, ...]], float]:
    """Each block costs something, and pairs cost more together than apart, or less."""
    cost = normal(blocks, seed=seed).exp()
    pairs = STRENGTH * normal(blocks, blocks, seed=seed + 1) * cost.outer(cost).sqrt()

    def loss(removed: tuple[int, ...]) -> float:
        part = list(removed)
        return float(cost[part].sum() + pairs[part][:, part].triu(1).sum())

    return loss


@pytest.mark.parametrize("seed", range(8))
def test_greedy_removal_finds_one_of_the_two_best_sets(seed: int) -> None:
    loss = synthetic(9, seed)
    steps = greedy(range(9), 4, loss)
    losses = sorted(loss(removed) for removed in combinations(range(9), 4))
    assert steps[-1].loss <= losses[1]
    assert steps[0].loss == min(loss((unit,)) for unit in range(9))


def test_without_interactions_greedy_removal_is_exact() -> None:
    cost = normal(12)
    steps = greedy(range(12), 5, lambda removed: float(cost[list(removed)].sum()))
    assert [step.unit for step in steps] == cost.argsort()[:5].tolist()


def test_a_loss_is_measured_again_after_each_removal() -> None:
    """Once one of two blocks that undo each other has gone, so must the other, at a gain."""

    def loss(removed: tuple[str, ...]) -> float:
        undone = {"left", "right"} & set(removed)
        return {0: 0.0, 1: 1.0, 2: 0.1}[len(undone)] + 2.0 * (len(removed) - len(undone))

    steps = greedy(["first", "left", "middle", "right", "last"], 2, loss)
    assert [(step.unit, step.loss) for step in steps] == [("right", 1.0), ("left", 0.1)]


def test_sets_are_asked_for_in_the_order_of_the_model_and_as_few_as_promised() -> None:
    asked: list[tuple[str, ...]] = []

    def loss(removed: tuple[str, ...]) -> float:
        asked.append(removed)
        return -len(removed) - ("d" in removed)

    assert [step.unit for step in greedy("abcd", 3, loss)] == ["d", "c", "b"]
    assert asked[4:7] == [("c", "d"), ("b", "d"), ("a", "d")]
    assert len(asked) == len(set(asked)) == 4 + 3 + 2
    assert greedy("abcd", 0, loss) == []


def test_a_removal_that_breaks_the_model_is_not_taken() -> None:
    losses = {0: math.nan, 1: math.inf, 2: 5.0, 3: -math.inf}
    assert greedy(range(4), 1, lambda removed: losses[removed[0]])[0].unit == 2


def test_in_a_trained_model_influence_ranks_inner_blocks_as_losses_do_and_greedy_removal_finds_the_best_pair(
    assets: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    lines = (assets / "data/calibration.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = tokenizer(texts, return_tensors="pt", truncation=True, max_length=96)["input_ids"]
    blocks = list(model.model.layers)
    turns = [Turn() for _ in blocks]
    for index, block in enumerate(blocks):

        def observe(_: object, args: tuple[Tensor, ...], output: Tensor, index: int = index) -> None:
            turns[index] = turns[index].including(args[0][:, 1:], output[:, 1:])

        block.register_forward_hook(observe)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.log_softmax(-1)
    influence = [turn.influence for turn in turns]
    assert turns[0].num_tokens == 8 * 95

    def loss(removed: tuple[int, ...]) -> float:
        model.model.layers = torch.nn.ModuleList(block for index, block in enumerate(blocks) if index not in removed)
        with torch.no_grad():
            part = model(tokens, use_cache=False).logits.log_softmax(-1)
        return float((whole.exp() * (whole - part)).sum(-1).mean())

    alone = [loss((index,)) for index in range(len(blocks))]
    assert influence.index(max(influence)) == alone.index(max(alone)) == 0
    assert max(range(1, 4), key=lambda index: alone[index]) not in least_influential(influence, 2)
    steps = greedy(range(len(blocks)), 2, loss)
    assert steps[-1].loss == min(loss(pair) for pair in combinations(range(len(blocks)), 2))
    assert steps[-1].loss < 0.8 * loss(tuple(least_influential(influence, 2)))
