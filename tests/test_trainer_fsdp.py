"""Trainer and a plain loop of accelerate's on two processes that share a model out by FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate_loop import BOUND as LOOP_BOUND
from accelerate_loop import run as loop
from test_trainer import CONFIG, STEPS, arguments, tiny_llama
from test_trainer_ranks import BOUND
from trainer_ranks import end, on_the_whole_batch, without_dropout
from transformers import LlamaForCausalLM

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback, check_carrier

SCRIPT = Path(__file__).parent / "trainer_fsdp.py"


def launch(folder: Path, **variables: str) -> Path:
    """The folder after ``accelerate launch`` with its flags for FSDP2; on GPUs where there are some to be seen."""
    flags = "--num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    flags += " --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
    flags += " --fsdp_cpu_ram_efficient_loading false --fsdp_state_dict_type SHARDED_STATE_DICT"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("sharded"), CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_sharded_model_is_trained_as_one_process_trains_it(ranks, tmp_path):
    alone = end(*on_the_whole_batch(tmp_path, 1))
    assert len({step for step, *_ in alone["moves"]}) == 4
    for both in (r["whole batch"] for r in ranks):
        assert both["sharded"] and both["step"] == STEPS and both["moves"] == alone["moves"]
        assert both["places"] == alone["places"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(both["weights"][name], weight, rtol=0, atol=BOUND)
    before = tiny_llama()
    changes = [w - before.get_submodule(n).weight for n, w in alone["weights"].items()]
    assert max(change.abs().max() for change in changes) > 100 * BOUND


def test_checkpointed_activations_change_nothing(ranks):
    for ends in ranks:
        toys.equal_bits(ends["checkpointing"], ends["whole batch"])


KINDS = "full state", "state in parts"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(ranks, kind):
    for ends in ranks:
        assert ends["not stopped"]["step"] == STEPS and ends[kind]["sharded"]
        end = {k: v for k, v in ends[kind].items() if not k.startswith("left")}
        toys.equal_bits(end, ends["not stopped"])
        toys.equal_bits(ends[kind], ranks[0][kind])


def test_the_state_is_on_the_scheduler_only_while_that_is_saved(ranks, folder):
    for ends in ranks:
        assert not any(ends[kind]["left on the scheduler"] for kind in KINDS)
    for kind, step in (("full", 5), ("parts", 6)):
        path = folder / kind / f"checkpoint-{step}" / "scheduler.pt"
        assert torch.load(path, weights_only=True)["losia"]["step"] == step


def test_save_model_leaves_the_tuned_plain_model(ranks, folder):
    model = LlamaForCausalLM.from_pretrained(folder / "tuned")
    tuned = ranks[0]["whole batch"]["weights"]
    toys.equal_bits({name: model.get_submodule(name).weight.detach() for name in tuned}, tuned)
    other = losia_pro.load_delta(without_dropout(), folder / "delta.safetensors")
    toys.equal_bits({name: other.get_submodule(name).weight.detach() for name in tuned}, tuned)


def test_a_plain_loop_trains_alike_and_goes_on_from_a_saved_state(ranks, tmp_path):
    alone = loop(tmp_path)
    for ends in ranks:
        for whole, again in ends["loops"].values():
            toys.equal_bits(again, whole)
            assert whole["moves"] == alone["moves"] and whole["places"] == alone["places"]
            for name, weight in alone["weights"].items():
                torch.testing.assert_close(whole["weights"][name], weight, rtol=0, atol=LOOP_BOUND)


@pytest.mark.parametrize(
    ("engine", "outcome"),
    [
        ("FSDP", "FSDP version 1 is not supported; use FSDP2"),
        ("FSDP2", r"PEFT's adapters are not saved under FSDP2; .*attach\(model\) returns"),
        (
            "DEEPSPEED",
            "DEEPSPEED is not supported; several processes .* DistributedDataParallel or",
        ),
        ("MEGATRON_LM", "MEGATRON_LM is not supported"),
    ],
)
def test_engines_that_shard_the_model_are_refused(tmp_path, monkeypatch, engine, outcome):
    """As soon as there is a Trainer, and where the callback came later, when it trains."""
    losia = losia_pro.attach(tiny_llama(), CONFIG)
    args = arguments(tmp_path)
    Accelerator(cpu=True)
    # Where accelerate notes its engine.
    monkeypatch.setitem(
        args.distributed_state._shared_state,
        "distributed_type",
        DistributedType[engine.rstrip("2")],
    )
    plugin = SimpleNamespace(fsdp_version=2 if engine == "FSDP2" else 1)
    model = SimpleNamespace(peft_config={})
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    for begins in (LosiaCallback(losia).on_init_end, LosiaCallback(losia).on_train_begin):
        with pytest.raises(ValueError, match=outcome):
            begins(args, None, None, model=model, optimizer=None)


def test_with_fsdp_a_scheduler_that_would_not_save_the_state_is_refused():
    class Own(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self):
            return {"last_epoch": self.last_epoch}

    optimizer = torch.optim.SGD(losia_pro.attach(tiny_llama(), CONFIG).parameters())
    with pytest.raises(ValueError, match="Own does not save those; use one of torch.optim.lr_sch"):
        check_carrier(Own(optimizer, lambda _: 1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    before = scheduler.state_dict()
    check_carrier(scheduler)
    assert scheduler.state_dict() == before
