"""The checksum of what a model has beside its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kunserve_sgl.memory.rest_checksum import rest_checksum


class Model(nn.Module):
    def __init__(self, is_tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def sum(self) -> str:
        return rest_checksum(self, list(self.layers))


@pytest.mark.parametrize("is_tied", [False, True])
def test_it_is_of_all_but_the_layers_and_what_the_model_makes_by_itself(is_tied: bool) -> None:
    model = Model(is_tied)
    before = model.sum()
    assert Model(is_tied).sum() == before
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.zero_()
            layer.bias.data = torch.empty(0)  # a dropped one
        model.scratch.fill_(1)
    assert model.sum() == before
    for name in ("embedding.weight", "norm.bias", "norm.running_mean", "head.weight"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.state_dict(keep_vars=True)[name].view(-1)[0] += 1
        assert changed.sum() != before, name
