"""Several GPUs, or one, train as one process does on the whole batch: through NCCL, data parallel and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from ranks import Run, Sharded, data, launch
from test_distributed import assert_equal
from torch.distributed.fsdp import CPUOffloadPolicy

pytestmark = pytest.mark.gpu

WAYS: dict[str, tuple[type[Run], dict[str, Any]]] = {
    "data-parallel": (Run, {}),
    "sharded": (Sharded, {}),
    "no-reshard": (Sharded, {"reshard_after_forward": False}),
    "offloaded": (Sharded, {"offload_policy": CPUOffloadPolicy()}),
}


def every_way(folder: str) -> dict[str, tuple[dict, dict]]:
    """A run that was not stopped, and one that was saved and loaded; a delta of the first."""
    ends = {}
    for name, (new, settings) in WAYS.items():
        whole = new(**settings).bind().go(data())
        state = new(**settings).bind().go(data()[:5]).state()
        again = new(**settings).bind().load(state).go(data()[5:])
        ends[name] = whole.end(), again.end()
        with whole.losia.base():
            ends[name][0]["base"] = ends[name][1]["base"] = whole.end_of_model()
        whole.losia.save_delta(f"{folder}/{name}")
    return ends


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    n = max(n for n in (1, 2, 3, 4) if n <= torch.cuda.device_count())  # they divide the batch
    return launch(every_way, n, folder, str(folder), backend="nccl")


@pytest.mark.parametrize("way", WAYS)
def test_gpus_train_as_one_process_on_the_whole_batch(ranks, way):
    alone = Run().bind().go(data()).end()
    untrained = dict(toys.stack(torch.float64).state_dict())
    for rank in ranks:
        end, again = rank[way]
        assert_equal(end, alone)
        toys.equal_bits(end["base"], untrained)
        toys.equal_bits(again, end)
