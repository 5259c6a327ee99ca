"""The matching language, on the layers of a two-block model with a mixture's router in the second."""

from __future__ import annotations

import pytest

from compress.models.selection import LayerName, did_you_mean, match, select

ROLES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
LAYERS = [
    LayerName("model.embed_tokens", "embedding", "Embedding"),
    *(LayerName(f"model.layers.{index}.{name}", role, "Linear") for index in range(2) for name, role in ROLES.items()),
    LayerName("model.layers.1.mlp.gate", "router", "Linear"),
    LayerName("lm_head", "lm_head", "Linear"),
]
DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def paths(*names: str) -> list[str]:
    return [f"model.layers.{index}.{name}" for index in range(2) for name in names]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("model.layers.0.mlp.down_proj", DOWN[:1]),
        (r"re:.*\.[01]\.mlp\.down_proj", DOWN),
        ("*.down_proj", DOWN),
        ("model.layers.?.mlp.down_proj", DOWN),
        ("model.layers.[1-3].mlp.down_proj", DOWN[1:]),
        ("attn.*", paths("self_attn.q_proj", "self_attn.o_proj")),
        ("mlp.down", DOWN),
        ("attn", paths("self_attn.q_proj", "self_attn.o_proj")),
        ("lm_head", ["lm_head"]),
        ("Embedding", ["model.embed_tokens"]),
    ],
)
def test_each_kind_of_selector_names_its_layers_in_model_order(selector: str, expected: list[str]) -> None:
    assert match(selector, LAYERS) == expected


def test_the_path_of_a_router_does_not_match_the_gate_projection() -> None:
    assert match("model.layers.1.mlp.gate", LAYERS) == ["model.layers.1.mlp.gate"]


@pytest.mark.parametrize("part", ["down_proj", "model.layers.0", "mlp.g", "att", "Lin", "", "re:mlp", "re:model"])
def test_a_part_of_a_name_matches_nothing(part: str) -> None:
    assert match(part, LAYERS) == []


def test_an_exact_path_wins_over_a_role_of_the_same_name() -> None:
    layers = [LayerName("head", "lm_head", "Linear"), LayerName("lm_head", "attn.q", "Linear")]
    assert match("lm_head", layers) == ["lm_head"]


def test_a_role_wins_over_a_class_of_the_same_name() -> None:
    layers = [LayerName("a", "other", "expert"), LayerName("b", "expert", "Linear")]
    assert match("expert", layers) == ["b"]


def test_case_matters() -> None:
    assert match("linear", LAYERS) == []


def test_a_broken_pattern_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression: missing \), unterminated"):
        match("re:(", LAYERS)


def test_select_keeps_what_matches_and_reports_every_selector_that_does_not() -> None:
    names, problems = select(["lm_haed", "*.down_proj", "re:(", "nothing alike"], LAYERS)
    assert names == {"*.down_proj": DOWN}
    assert problems == [
        "'lm_haed' matches no layer. Did you mean 'lm_head'?",
        "'re:(' is not a regular expression: missing ), unterminated subpattern at position 0.",
        "'nothing alike' matches no layer.",
    ]


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ("atn.q", "attn.q"),
        ("linear", "Linear"),
        ("down_proj", "*.down_proj"),
        ("*.dwn_proj", "*.down_proj"),
        ("model.layers.1.mlp", "model.layers.1.mlp.*"),
        ("model.layers.1.mlp.dwn_proj", "model.layers.1.mlp.down_proj"),
    ],
)
def test_the_suggestion_is_a_selector_that_would_have_matched(selector: str, meant: str) -> None:
    assert select([selector], LAYERS)[1] == [f"{selector!r} matches no layer. Did you mean {meant!r}?"]
    assert match(meant, LAYERS)


def test_a_pattern_that_covers_a_part_of_a_path_is_told_so() -> None:
    assert select(["re:mlp.gate"], LAYERS)[1] == [
        "'re:mlp.gate' matches no layer. A pattern must match the whole path, "
        "and this one matches a part of 'model.layers.0.mlp.gate_proj'."
    ]


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("zebra", ["lm_head", "attn.q"]) == ""
