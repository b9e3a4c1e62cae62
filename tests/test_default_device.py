"""``torch.set_default_device``: subnets and deltas lie where the model does, wherever new tensors would."""

from __future__ import annotations

import copy

import pytest
import torch
import toys

import losia_pro
from losia_pro import LosiaConfig, delta


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (LosiaConfig(rank_factor=1 / 4), "blocks"),
        (LosiaConfig(rank_factor=1 / 4, neuron_group=4), "blocks"),
        (LosiaConfig(in_factor=1 / 8, out_factor=1.0), "bitmap"),
    ],
    ids=["neurons", "runs", "bitmap"],
)
def test_attaching_saving_and_loading_stay_on_the_models_device(config, form, tmp_path):
    """The meta device holds no values: a tensor that lands there is an error."""
    model = toys.stack(width=64, hidden=72)
    base = copy.deepcopy(model)
    with torch.device("meta"):
        losia = losia_pro.attach(model, config)
        with torch.no_grad():
            for subnet in losia.parameters():
                subnet.add_(1.0)
        losia.save_delta(tmp_path / "delta")
        header, _ = delta.read(tmp_path / "delta")
        assert form in delta.modules_of(header).values()
        losia_pro.load_delta(base, tmp_path / "delta")
    toys.equal_bits(base.state_dict(), losia.detach().state_dict())
