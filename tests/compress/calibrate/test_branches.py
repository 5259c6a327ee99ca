"""Branches: divergences of changed models, found in one walk, are those of models that were changed for good."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from compress.calibrate.block import Block
from compress.calibrate.branches import Change, divergences
from compress.models.store import LazyModel

TOKENS = torch.randint(2, 250, (4, 16), generator=torch.Generator().manual_seed(0))
DOWN, QUERY = "model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"


def propose(block: Block) -> Iterator[tuple[Hashable, Change]]:
    """A halved layer in the first block, one in the last, both under one name, and a change that changes nothing."""
    for name in (DOWN, QUERY):
        if name.startswith(f"{block.name}."):
            weight = block.weight(name)
            yield name, partial(block.forward, weights={name: weight / 2})
            yield "both", partial(block.forward, weights={name: weight / 2})
            yield f"none in {block.index}", partial(block.forward, weights={name: weight})


def measured(model: Path, scratch: Path) -> dict[Hashable, float]:
    return divergences(LazyModel.open(model), TOKENS, scratch, propose)


@torch.inference_mode()
def expected(folder: Path, *halved: str) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model(TOKENS).logits.log_softmax(dim=-1)
    for name in halved:
        model.get_parameter(f"{name}.weight").div_(2)
    found = model(TOKENS).logits.log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Hashable, float]:
    return measured(tiny, tmp_path_factory.mktemp("branches"))


@pytest.mark.parametrize("halved", [(DOWN,), (QUERY,), (DOWN, QUERY)])
def test_a_branch_diverges_as_the_changed_model_does(
    halved: tuple[str, ...], found: dict[Hashable, float], tiny: Path
) -> None:
    name = halved[0] if len(halved) == 1 else "both"
    assert found[name] == pytest.approx(expected(tiny, *halved), rel=1e-4)


@pytest.mark.parametrize("block", [0, 2])
def test_a_branch_that_changes_nothing_does_not_diverge(block: int, found: dict[Hashable, float]) -> None:
    assert found[f"none in {block}"] == pytest.approx(0, abs=1e-6)


def test_the_model_is_left_as_it_was(tiny: Path, tmp_path: Path) -> None:
    model = LazyModel.open(tiny)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = divergences(model, TOKENS, tmp_path / "a", propose)
    assert divergences(model, TOKENS, tmp_path / "b", propose) == first
