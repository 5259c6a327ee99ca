"""The hand-written anatomies against the models themselves: names, order, shared inputs, exact folds."""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError
from compress.models import FAMILIES, anatomy_for
from compress.models.anatomy import Anatomy, Site


def output(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return model(input_ids=tokens, use_cache=False)[0]


def run_order(model: PreTrainedModel, tokens: Tensor) -> tuple[list[str], dict[str, Tensor]]:
    """Module paths in the order they start, and what each was first given."""
    order: list[str] = []
    inputs: dict[str, Tensor] = {}

    def record(name: str, args: tuple[object, ...]) -> None:
        order.append(name)
        if args and isinstance(args[0], Tensor):
            inputs[name] = args[0]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: record(name, args))
        for name, module in model.named_modules()
    ]
    output(model, tokens)
    for hook in hooks:
        hook.remove()
    return order, inputs


def present(model: PreTrainedModel, paths: tuple[str, ...]) -> list[str]:
    modules = dict(model.named_modules())
    return [path for path in paths if path in modules]


def columns_per_channel(model: PreTrainedModel, channels: int, columns: int) -> Tensor:
    """The source channel each input column of a layer reads; grouped-query attention repeats heads."""
    if channels == columns:
        return torch.arange(columns)
    head_dim = getattr(model.config, "head_dim", None) or (model.config.hidden_size // model.config.num_attention_heads)
    heads = torch.arange(channels).view(-1, head_dim)
    return heads.repeat_interleave(columns // channels, dim=0).flatten()


def fold(model: PreTrainedModel, anatomy: Anatomy, site: Site, source: str) -> None:
    """Scale what `source` puts out by random powers of two, and the site's columns by their inverse."""
    for index, block in enumerate(model.get_submodule(anatomy.blocks)):
        norm_or_linear = block.get_submodule(source)
        weight = norm_or_linear.weight
        generator = torch.Generator().manual_seed(index)
        scale = 2.0 ** torch.randint(-2, 3, (len(weight),), generator=generator)
        if weight.ndim == 1:
            weight.copy_((anatomy.norm_offset + weight) * scale - anatomy.norm_offset)
        else:
            weight.mul_(scale.unsqueeze(1))
        if getattr(norm_or_linear, "bias", None) is not None:
            norm_or_linear.bias.mul_(scale)
        for name in site.layers:
            matrix = block.get_submodule(name).weight
            matrix = matrix.T if anatomy.transposed else matrix
            matrix.div_(scale[columns_per_channel(model, len(scale), matrix.shape[1])])


def test_every_family_in_the_table_has_a_tiny_model(tiny_model_types: set[str]) -> None:
    assert tiny_model_types == set(FAMILIES)


def test_exactly_the_linear_layers_of_a_block_have_roles(model: PreTrainedModel, anatomy: Anatomy) -> None:
    for block in model.get_submodule(anatomy.blocks):
        linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        assert set(anatomy.roles) == linear


def test_blocks_and_outer_modules_hold_every_parameter(model: PreTrainedModel, anatomy: Anatomy) -> None:
    paths = (anatomy.blocks, *anatomy.before, *anatomy.after, *filter(None, [anatomy.head]))
    homeless = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{path}.") for path in paths)
    ]
    assert homeless == []


def test_the_embedding_is_the_one_the_model_reads_tokens_with(model: PreTrainedModel, anatomy: Anatomy) -> None:
    assert model.get_submodule(anatomy.embedding) is model.get_input_embeddings()


def test_the_head_is_the_one_the_model_predicts_tokens_with(
    family: str, model: PreTrainedModel, anatomy: Anatomy
) -> None:
    if family.startswith("bert") or family.endswith("trunk"):
        assert anatomy.head is None
    else:
        assert anatomy.head is not None
        assert model.get_submodule(anatomy.head) is model.get_output_embeddings()


def test_outer_modules_run_on_their_side_of_the_blocks(
    model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor
) -> None:
    order, _ = run_order(model, tokens)
    first = order.index(f"{anatomy.blocks}.0")
    assert all(order.index(path) < first for path in present(model, anatomy.before))
    assert all(order.index(path) > first for path in present(model, anatomy.after))


def test_sites_are_in_the_order_data_passes_them(model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor) -> None:
    order, _ = run_order(model, tokens)
    for index in range(len(model.get_submodule(anatomy.blocks))):
        starts = [[order.index(f"{anatomy.blocks}.{index}.{name}") for name in site.layers] for site in anatomy.sites]
        assert all(max(earlier) < min(later) for earlier, later in pairwise(starts))


def test_layers_of_one_site_see_the_same_input_and_sites_see_different_ones(
    model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor
) -> None:
    _, inputs = run_order(model, tokens)
    for index in range(len(model.get_submodule(anatomy.blocks))):
        seen: dict[int, set[int]] = defaultdict(set)
        for number, site in enumerate(anatomy.sites):
            for name in site.layers:
                seen[number].add(inputs[f"{anatomy.blocks}.{index}.{name}"].data_ptr())
        assert all(len(pointers) == 1 for pointers in seen.values())
        assert len(set.union(*seen.values())) == len(anatomy.sites)


def test_a_scale_folded_into_a_source_leaves_the_function_as_it_is(
    model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor
) -> None:
    folded = copy.deepcopy(model)
    for site in anatomy.sites:
        if site.source:
            fold(folded, anatomy, site, site.source)
    before, after = output(model, tokens), output(folded, tokens)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize(
    ("family", "layer", "source"),
    [
        ("opt post-norm", "self_attn.q_proj", "self_attn_layer_norm"),
        ("opt post-norm", "fc1", "final_layer_norm"),
        ("opt gelu", "fc2", "fc1"),
        ("bert", "intermediate.dense", "attention.output.LayerNorm"),
        ("gemma2", "mlp.up_proj", "post_attention_layernorm"),
        ("olmo2", "self_attn.q_proj", "post_attention_layernorm"),
    ],
    indirect=["family"],
)
def test_what_is_not_named_as_a_source_would_change_the_function(
    model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor, layer: str, source: str
) -> None:
    site = next(site for site in anatomy.sites if layer in site.layers)
    assert site.source != source
    folded = copy.deepcopy(model)
    fold(folded, anatomy, site, source)
    before, after = output(model, tokens), output(folded, tokens)
    assert (before - after).abs().max() > 1e-2 * before.abs().max()


def test_relu_lets_a_scale_pass_and_gelu_does_not() -> None:
    def sources(config: dict[str, object]) -> list[str | None]:
        shapes = {
            f"model.decoder.layers.0.{name}.weight": (32, 32)
            for name in (*FAMILIES["opt"].roles, "self_attn_layer_norm", "final_layer_norm")
        }
        anatomy = anatomy_for({"model_type": "opt", "do_layer_norm_before": True} | config, shapes)
        return [site.source for site in anatomy.sites]

    assert sources({"activation_function": "relu"})[-1] == "fc1"
    assert sources({"activation_function": "gelu"})[-1] is None
    assert sources({})[-1] is None


def test_a_norm_without_weights_is_no_source() -> None:
    shapes = {f"model.layers.0.{name}.weight": (32, 32) for name in FAMILIES["llama"].roles}
    anatomy = anatomy_for({"model_type": "llama"}, shapes)
    assert [site.source for site in anatomy.sites] == [None, "self_attn.v_proj", None, "mlp.up_proj"]


def test_weights_of_another_family_are_refused_by_naming_what_is_missing_and_what_is_there() -> None:
    shapes = {"model.layers.0.self_attn.qkv_proj.weight": (96, 32)}
    with pytest.raises(ModelError, match=r"'llama'.*self_attn\.q_proj.*self_attn\.qkv_proj"):
        anatomy_for({"model_type": "llama"}, shapes)


def test_a_checkpoint_that_left_out_its_root_still_has_the_paths_of_its_class() -> None:
    shapes = {f"h.0.{name}.weight": (32, 32) for name in (*FAMILIES["gpt2"].roles, "ln_1", "ln_2")}
    with_head = anatomy_for({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, shapes)
    trunk = anatomy_for({"model_type": "gpt2", "architectures": ["GPT2Model"]}, shapes)
    assert (with_head.blocks, trunk.blocks) == ("transformer.h", "h")
    assert with_head.sites == trunk.sites == FAMILIES["gpt2"].sites
