"""Low-rank products: nothing at first, and merged they are what was computed with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from compress.distill.lora import attach, merged
from compress.errors import RequestError


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), Conv1D(5, 4), nn.Linear(5, 6, bias=False))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(6, 3)})


def test_merged_weights_compute_what_layer_and_product_do() -> None:
    plain, trained = model(), model()
    layers = attach(trained, "blocks", 2, torch.Generator().manual_seed(0))
    assert layers == {"blocks.0": False, "blocks.2": True, "blocks.3": False}
    x = torch.randn(7, 6)
    assert torch.equal(trained["blocks"](x), plain["blocks"](x))
    assert {name.rpartition(".")[2] for name, each in trained.named_parameters() if each.requires_grad} == {"A", "B"}
    for name in layers:
        nn.init.normal_(trained.get_submodule(name).B)
    state = dict(trained.named_parameters())
    plain.load_state_dict(merged(state, layers))
    assert_close(plain["blocks"](x), trained["blocks"](x))
    assert "blocks.0.A" in state, "it is not changed"


def test_products_of_a_rank_that_layers_do_not_have_are_refused() -> None:
    with pytest.raises(RequestError, match=r"lora_rank=5 is more than blocks.0 \[4, 6\] has"):
        attach(model(), "blocks", 5, torch.Generator())
    with pytest.raises(RequestError, match="there are no linear layers in head"):
        attach(nn.ModuleDict({"head": nn.ModuleList([nn.LayerNorm(3)])}), "head", 2, torch.Generator())
