"""Groups of parameters: what decays, and what goes at a rate of its own."""

from __future__ import annotations

import torch
from torch import nn

from compress.distill.optimizer import make_optimizer, parameter_groups


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(2))
        self.log_scale = nn.Parameter(torch.ones(2, 1))
        self.zero_point = nn.Parameter(torch.ones(2, 1))


def test_matrices_alone_decay_and_steps_of_a_grid_have_their_own_rate() -> None:
    layer = nn.Sequential(Layer())
    groups, rates = parameter_groups(layer, weight_decay=0.1, scale_rate=0.25)
    inner = layer[0]
    members = [[inner.weight], [inner.bias], [inner.log_scale, inner.zero_point]]
    for group, wanted in zip(groups, members, strict=True):
        assert all(one is other for one, other in zip(group["params"], wanted, strict=True))
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]
    assert rates == [1, 1, 0.25]
    make_optimizer("adamw", groups, torch.device("cpu")).step()


def test_a_group_without_members_is_left_out() -> None:
    groups, rates = parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1, scale_rate=0.25)
    assert len(groups) == len(rates) == 1
