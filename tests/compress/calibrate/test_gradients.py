"""Gradients, block by block: the very ones of the whole model at once, and never more than one block in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compress.calibrate import gradients
from compress.calibrate.gradients import InputGradient, input_gradients
from compress.errors import NumericalError
from compress.models import anatomy_for
from compress.models.headers import read_folder
from compress.models.store import LazyModel

ROLES = ("attn.o", "mlp.down")
TOKENS = torch.randint(2, 128, (5, 24), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "GPTNeoXForCausalLM": SHAPE,
    "OPTForCausalLM": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "Gemma2ForCausalLM": GROUPED | {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "GraniteForCausalLM": GROUPED | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
}


def saved(architecture: str, folder: Path) -> Path:
    """A model of this architecture, random in float32, biases and norms too."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(vocab_size=128, **FAMILIES[architecture]))
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def by_autograd(folder: Path, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → its inputs and ∂L/∂inputs, L being the loss that transformers trains a model by, summed."""
    headers = read_folder(folder)
    anatomy = anatomy_for(headers.config, headers.shapes)
    model_class = getattr(transformers, headers.config["architectures"][0])
    model = model_class.from_pretrained(folder).eval()
    seen: dict[str, Tensor] = {}
    for index, block in enumerate(model.get_submodule(anatomy.blocks)):
        for layer, role in anatomy.roles.items():
            if role in ROLES:
                name = f"{anatomy.blocks}.{index}.{layer}"
                block.get_submodule(layer).register_forward_pre_hook(
                    lambda _, args, name=name: seen.update({name: args[0]})
                )
    loss = model(tokens, labels=tokens).loss * tokens[:, 1:].numel()
    gradients = torch.autograd.grad(loss, [*seen.values()])
    return {
        name: (inputs.detach().flatten(0, -2), gradient.flatten(0, -2))
        for (name, inputs), gradient in zip(seen.items(), gradients, strict=True)
    }


def by_block(folder: Path, scratch: Path, roles: Sequence[str] = ROLES) -> dict[str, tuple[Tensor, Tensor]]:
    """The same from a model whose blocks come one by one."""
    found: dict[str, list[InputGradient]] = defaultdict(list)
    for each in input_gradients(LazyModel.open(folder), TOKENS, scratch, roles):
        found[each.layer].append(each)
    return {
        name: (torch.cat([batch.inputs for batch in batches]), torch.cat([batch.gradient for batch in batches]))
        for name, batches in found.items()
    }


def assert_alike(found: dict[str, tuple[Tensor, Tensor]], expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        for ours, whole in zip(pair, expected[name], strict=True):
            assert (ours - whole).abs().max() < 1e-5 * whole.abs().max(), name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_they_are_those_of_the_whole_model_at_once(architecture: str, tmp_path: Path) -> None:
    folder = saved(architecture, tmp_path / "model")
    found = by_block(folder, tmp_path / "scratch")
    assert len(found) == 6
    assert_alike(found, by_autograd(folder, TOKENS))
    assert not (tmp_path / "scratch").exists()


def test_a_few_windows_and_a_few_logits_at_a_time_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("LlamaForCausalLM", tmp_path / "model")
    monkeypatch.setattr(gradients, "KEPT_TOKENS", 2 * TOKENS.shape[1])
    monkeypatch.setattr(gradients, "LOGITS_BYTES", 7 * 4 * 128)
    assert_alike(by_block(folder, tmp_path / "scratch"), by_autograd(folder, TOKENS))


def test_layers_come_from_the_last_to_the_first_and_only_those_of_the_roles_asked_for(tmp_path: Path) -> None:
    folder = saved("GPTNeoXForCausalLM", tmp_path / "model")
    found = by_block(folder, tmp_path / "scratch", ["attn.o"])
    assert [*found] == [f"gpt_neox.layers.{index}.attention.dense" for index in (2, 1, 0)]


def test_the_last_token_of_a_window_predicts_nothing(tmp_path: Path) -> None:
    _, gradient = by_block(saved("LlamaForCausalLM", tmp_path / "model"), tmp_path / "scratch")[
        "model.layers.2.mlp.down_proj"
    ]
    by_window = gradient.unflatten(0, TOKENS.shape)
    assert not by_window[:, -1].any()
    assert by_window[:, :-1].any(dim=2).all()


def test_one_block_is_filled_at_a_time_forwards_and_backwards(tmp_path: Path) -> None:
    model = LazyModel.open(saved("LlamaForCausalLM", tmp_path / "model"))
    filled: list[list[int]] = []

    def look(*_: Any) -> None:
        filled.append([i for i, block in enumerate(model.blocks) if not any(p.is_meta for p in block.parameters())])

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    for _ in input_gradients(model, TOKENS, tmp_path / "scratch", ROLES):
        pass
    assert filled == [[0], [1], [2], [2], [1], [0]]
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_a_gradient_that_is_not_finite_is_named_by_its_layer(tmp_path: Path) -> None:
    folder = saved("LlamaForCausalLM", tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.layers[2].mlp.up_proj.weight, torch.inf)
    model.save_pretrained(folder)
    with pytest.raises(NumericalError, match=r"layers\.2\..*: the gradient of the loss .* is not finite"):
        by_block(folder, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
