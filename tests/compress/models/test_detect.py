"""The detector against the hand-written anatomies, on the same models under names it does not know."""

from __future__ import annotations

import pytest

from compress.errors import ModelError
from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.detect import detect
from compress.models.headers import Folder


@pytest.fixture
def detected(headers: Folder) -> Anatomy:
    return anatomy_for(headers.config | {"model_type": "never_heard_of"}, headers.shapes)


def decoder(layers: dict[str, tuple[int, ...]], num_blocks: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder with vocabulary 100 and hidden size 16 that has these weights in each block."""
    blocks = {
        f"model.layers.{index}.{name}.weight": shape for index in range(num_blocks) for name, shape in layers.items()
    }
    return blocks | {"model.embed_tokens.weight": (100, 16), "lm_head.weight": (100, 16)}


ATTENTION: dict[str, tuple[int, ...]] = {f"attn.{name}_proj": (16, 16) for name in "qkvo"}


def test_the_detector_finds_the_blocks(detected: Anatomy, anatomy: Anatomy) -> None:
    assert detected.blocks == anatomy.blocks


def test_the_detector_gives_the_layers_the_roles_written_by_hand(detected: Anatomy, anatomy: Anatomy) -> None:
    assert detected.roles == anatomy.roles


def test_the_detector_groups_the_layers_that_share_an_input(detected: Anatomy, anatomy: Anatomy) -> None:
    def groups(anatomy: Anatomy) -> list[tuple[set[str], bool]]:
        return [(set(site.layers), site.fused) for site in anatomy.sites]

    assert groups(detected) == groups(anatomy)


def test_the_detector_sees_how_weights_are_stored(detected: Anatomy, anatomy: Anatomy) -> None:
    assert detected.transposed == anatomy.transposed


def test_the_detector_finds_the_embedding(detected: Anatomy, anatomy: Anatomy) -> None:
    assert detected.embedding == anatomy.embedding


def test_the_detector_never_folds(detected: Anatomy) -> None:
    assert all(site.source is None for site in detected.sites)


def test_the_detected_parts_hold_every_tensor_of_the_files(detected: Anatomy, headers: Folder) -> None:
    paths = (detected.blocks, *detected.before, *detected.after, *filter(None, [detected.head]))
    assert [name for name in headers.shapes if not any(name.startswith(f"{path}.") for path in paths)] == []


def test_the_conclusions_name_every_layer_and_its_role(detected: Anatomy) -> None:
    assert {f"{name} is {role}" for name, role in detected.roles.items()} <= set(detected.conclusions)


def test_known_families_need_no_conclusions(anatomy: Anatomy) -> None:
    assert anatomy.conclusions == ()


def test_the_first_feed_forward_matrix_is_a_gate_only_where_there_is_a_third() -> None:
    two = decoder(ATTENTION | {"mlp.w1": (48, 16), "mlp.w2": (16, 48)})
    three = decoder(ATTENTION | {"mlp.w1": (48, 16), "mlp.w2": (16, 48), "mlp.w3": (48, 16)})
    assert detect({}, two).roles["mlp.w1"] == "mlp.up"
    assert detect({}, three).roles["mlp.w1"] == "mlp.gate"


def test_a_name_whose_shape_contradicts_it_is_only_linear() -> None:
    roles = detect({}, decoder(ATTENTION | {"attn.k_proj": (16, 6)})).roles
    assert (roles["attn.q_proj"], roles["attn.k_proj"]) == ("attn.q", "linear")


def test_a_layer_with_an_unknown_name_is_linear_and_on_its_own() -> None:
    anatomy = detect({}, decoder(ATTENTION | {"mixer.frobnicate": (16, 16)}))
    site = next(site for site in anatomy.sites if "mixer.frobnicate" in site.layers)
    assert (dict(site.roles), site.fused) == ({"mixer.frobnicate": "linear"}, False)


def test_queries_of_cross_attention_do_not_share_an_input_with_keys() -> None:
    anatomy = detect({}, decoder({f"cross_attn.{name}_proj": (16, 16) for name in "qkvo"}))
    assert all(len(site.layers) == 1 for site in anatomy.sites)


@pytest.mark.parametrize(
    "experts",
    [
        {"mlp.experts.0.up_proj": (48, 16), "mlp.experts.1.up_proj": (48, 16), "mlp.gate": (2, 16)},
        {"mlp.experts.up_proj": (2, 48, 16), "mlp.router": (2, 16)},
        {"block_sparse_moe.input_linear": (2, 48, 16), "block_sparse_moe.router.layer": (2, 16)},
    ],
)
def test_experts_and_their_router_stay_as_they_are(experts: dict[str, tuple[int, ...]]) -> None:
    anatomy = detect({}, decoder(ATTENTION | {"mlp.shared_expert.up_proj": (48, 16)} | experts))
    assert set(anatomy.roles) == {*ATTENTION, "mlp.shared_expert.up_proj"}
    assert "mixture of experts: expert matrices and routers stay as they are" in anatomy.conclusions


def test_experts_numbered_inside_a_block_are_not_taken_for_the_blocks() -> None:
    experts = {f"mlp.experts.{index}.up_proj": (48, 16) for index in range(64)}
    assert detect({}, decoder(ATTENTION | experts)).blocks == "model.layers"


def test_layers_that_only_some_blocks_have_stay_as_they_are() -> None:
    shapes = decoder(ATTENTION) | {"model.layers.1.mamba.in_proj.weight": (64, 16)}
    anatomy = detect({}, shapes)
    assert set(anatomy.roles) == set(ATTENTION)
    assert "not in every block, and so left as they are: mamba.in_proj" in anatomy.conclusions


def test_a_tied_head_is_named_after_the_model_class() -> None:
    shapes = decoder(ATTENTION)
    del shapes["lm_head.weight"]
    assert detect({"architectures": ["NewForCausalLM"]}, shapes).head == "lm_head"
    assert detect({"architectures": ["NewModel"]}, shapes).head is None


def test_weights_without_repeated_blocks_are_refused_with_what_they_hold() -> None:
    with pytest.raises(ModelError, match=r"no repeated blocks.*conv\.weight"):
        detect({}, {"conv.weight": (8, 3, 3, 3), "fc.weight": (10, 8)})
