"""Fewer experts: rows of the router, and means of matrices, as they are read."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from compress.models.headers import Folder, canonical
from compress.models.merged_experts import MergedExperts, mixtures, with_experts
from compress.models.store import LazyModel, Weights


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"], indirect=True)
def test_experts_that_stay_are_means_and_the_router_keeps_their_rows(headers: Folder) -> None:
    whole = Weights(headers)
    folder = with_experts(headers, whole.anatomy, 2)
    kept = torch.tensor([[1, 3], [0, 2]])
    shares = torch.tensor([[[0, 1, 0, 0], [0.25, 0, 0, 0.75]], [[1, 0, 0, 0], [0, 0, 1, 0]]], dtype=torch.float64)
    weights = MergedExperts(folder, whole, kept, shares)
    LazyModel(weights, dtype=torch.float32)  # to which nothing is missing
    first, second = mixtures(whole.anatomy, whole.tensors)
    assert torch.equal(weights.read(f"{first}.gate.weight"), whole.read(f"{first}.gate.weight")[kept[0]])
    for parameter in ("gate_up_proj", "down_proj"):
        before = whole.read(f"{first}.experts.{parameter}")
        after = weights.read(f"{first}.experts.{parameter}")
        assert torch.equal(after[0], before[1])
        assert_close(after[1], 0.25 * before[0] + 0.75 * before[3])
        assert torch.equal(
            weights.read(f"{second}.experts.{parameter}"), whole.read(f"{second}.experts.{parameter}")[kept[1]]
        )
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(weights.read(norm), whole.read(norm))


@pytest.mark.parametrize("family", ["mixtral"], indirect=True)
def test_no_token_is_sent_to_more_experts_than_there_are(headers: Folder) -> None:
    anatomy = Weights(headers).anatomy
    for count, routed in ((3, 2), (1, 1)):
        folder = with_experts(headers, anatomy, count)
        assert folder.config["num_local_experts"] == count
        assert folder.config["num_experts_per_tok"] == routed
        assert sum(name.endswith(".w1.weight") for name in canonical(folder.tensors, anatomy)) == 2 * count
