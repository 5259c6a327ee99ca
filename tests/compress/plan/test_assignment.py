"""Who does what to which layer: the layers that low_rank compensates, and those it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.pipeline import prepare
from compress.recipe import Recipe, parse

ROUND, LOW_RANK = "rtn: {scheme: w3a16, group_size: 32}", "low_rank: {rank: 8}"


def recipe(*stages: str) -> Recipe:
    return parse("stages:\n" + "".join(f"  - {stage}\n" for stage in stages), "x.yaml")


def test_low_rank_gives_a_product_to_the_layers_that_are_named(tiny: Path) -> None:
    stage = "low_rank: {layers: [attn, mlp.down], ignore: ['*.1.*', attn.k]}"
    layers = prepare(recipe(ROUND, stage), model=str(tiny)).layers
    ends = {layer.name.removeprefix("model.layers.") for layer in layers if layer.rank}
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    assert ends == {f"{block}.{name}" for block in (0, 2) for name in names}


def test_low_rank_needs_no_text_where_only_weights_are_looked_at(tiny: Path) -> None:
    assert prepare(recipe(ROUND, "low_rank: {method: svd}"), model=str(tiny)).calibration_tokens == 0
    assert prepare(recipe(ROUND, LOW_RANK), model=str(tiny)).calibration_tokens > 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((LOW_RANK, ROUND), "x.yaml:2:5: low_rank makes up for what quantizers lost; put it after all of them"),
        (
            ("rtn: {scheme: w8a8}", LOW_RANK),
            "x.yaml:3:5: model.layers.0.self_attn.q_proj and 20 more layers: w8a8 rounds inputs.* ends in a16",
        ),
        (
            ("rotate: {r4: true}", ROUND, LOW_RANK),
            "model.layers.0.mlp.down_proj and 2 more layers: inputs are rotated while it runs.*Set r4: false",
        ),
        (
            (ROUND, "low_rank: {rank: 33}"),
            "0.self_attn.k_proj and 5 more layers: rank=33 is more than a matrix of 32 rows.*Use at most 32",
        ),
        (
            ("rtn: {scheme: w3a16, group_size: 32, ignore: [mlp]}", "low_rank: {layers: [mlp.up]}"),
            "model.layers.0.mlp.up_proj and 2 more layers: not quantized",
        ),
        ((ROUND, "low_rank: {ignore: [mlp, attn]}"), r"stages\[1\].low_rank would change nothing"),
        (
            (ROUND, "low_rank: {ignore: [mpl]}"),
            r"stages\[1\].low_rank.ignore: 'mpl' matches no layer. Did you mean",
        ),
        ((ROUND, LOW_RANK, LOW_RANK), "x.yaml:4:5: one adapter holds all products"),
        (
            (ROUND, LOW_RANK, "bias_correction: {}"),
            "low_rank and bias_correction would make up for the same error",
        ),
    ],
)
def test_what_cannot_be_compensated_is_refused(stages: tuple[str, ...], message: str, tiny: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(*stages), model=str(tiny))


@pytest.mark.parametrize(
    "stages",
    [
        ("rtn: {scheme: w8a8, layers: [mlp]}", "gptq: {scheme: w4a16, group_size: 32, layers: [attn]}"),
        ("rotate: {r4: true}", ROUND),
    ],
)
def test_the_other_layers_of_such_a_model_can_be(stages: tuple[str, ...], tiny: Path) -> None:
    layers = prepare(recipe(*stages, "low_rank: {layers: [attn]}"), model=str(tiny)).layers
    assert {layer.role for layer in layers if layer.rank} == {"attn.q", "attn.k", "attn.v", "attn.o"}
