"""Trainer and a plain loop of accelerate's on two GPUs that share a model out by FSDP2, through NCCL."""

from __future__ import annotations

import pytest
import test_trainer_fsdp as on_cpus
import torch
from test_trainer_fsdp import (  # noqa: F401 - the same tests, of what the GPUs did
    ranks,
    test_a_plain_loop_trains_alike_and_goes_on_from_a_saved_state,
    test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped,
    test_a_sharded_model_is_trained_as_one_process_trains_it,
    test_checkpointed_activations_change_nothing,
    test_save_model_leaves_the_tuned_plain_model,
    test_the_state_is_on_the_scheduler_only_while_that_is_saved,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_cpus.launch(tmp_path_factory.mktemp("sharded"))
