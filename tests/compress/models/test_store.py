"""Weights that stay on disk: the streamed model computes what the loaded one computes, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from compress.models.headers import Folder
from compress.models.store import LazyModel


@pytest.fixture
def lazy(folder: Path) -> LazyModel:
    return LazyModel.open(folder)


def filled(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.is_meta]


def test_the_streamed_model_computes_what_the_loaded_model_computes(
    lazy: LazyModel, headers: Folder, tokens: Tensor
) -> None:
    model_class = getattr(transformers, headers.config["architectures"][0])
    loaded = model_class.from_pretrained(headers.path, dtype=torch.float32).eval()
    with torch.no_grad(), lazy.streamed() as streamed:
        assert torch.equal(streamed(input_ids=tokens)[0], loaded(input_ids=tokens)[0])


def test_opening_reads_no_weights(lazy: LazyModel) -> None:
    assert filled(lazy.module) == []


def test_one_block_at_a_time_is_in_memory(lazy: LazyModel, tokens: Tensor) -> None:
    resident = []
    for block in lazy.blocks:
        block.register_forward_hook(
            lambda *_: resident.append([index for index, block in enumerate(lazy.blocks) if filled(block)])
        )
    with torch.no_grad(), lazy.streamed() as streamed:
        streamed(input_ids=tokens)
    assert resident == [[index] for index in range(len(lazy.blocks))]


def test_after_streaming_nothing_is_left_in_memory(lazy: LazyModel, tokens: Tensor) -> None:
    with torch.no_grad(), lazy.streamed() as streamed:
        streamed(input_ids=tokens)
    assert filled(lazy.module) == []
