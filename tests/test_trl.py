"""TRL's trainers take LoSiA as peft_config; DPO's reference is the untouched base at every step."""

from __future__ import annotations

import pytest
import torch
import toys
from cli_tools import PAIRS, make_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback
from losia_pro.peft import LosiaConfig

STEPS = 8
SETTINGS = {"rank_factor": 1 / 4, "period": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), torch.float32)


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def options(folder, **changes):
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "gradient_checkpointing": False, "bf16": False, "max_length": 32,
        **changes,
    }  # fmt: skip


def preferences() -> Dataset:
    """One word is preferred to another."""
    rows = [{"prompt": p["prompt"], "chosen": " red!", "rejected": " two!"} for p in PAIRS[:32]]
    return Dataset.from_list(rows)


def dpo(folder, out, **changes):
    return DPOTrainer(
        model=str(folder), args=DPOConfig(**options(out, **changes)), train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LosiaConfig(**SETTINGS), callbacks=[LosiaCallback()],
    )  # fmt: skip


def test_sft_trains_the_subnets(folder, tmp_path):
    pairs = [{"prompt": p["prompt"], "completion": p["response"]} for p in PAIRS]
    trainer = SFTTrainer(
        model=str(folder), args=SFTConfig(**options(tmp_path)), train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LosiaConfig(**SETTINGS), callbacks=[LosiaCallback()],
    )  # fmt: skip
    trainer.train()
    losia = trainer.model.losia
    assert losia.step == STEPS and {r.step for r in losia.history} == {2, 4, 6, 8}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    base, tuned = model_of(folder), trainer.model.merge_and_unload()
    before, after = base.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n + ".weight" for n in losia.modules}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_takes_the_untouched_base_for_its_reference(folder, tmp_path, checkpointing):
    """The log-probabilities that were computed before training give the same run, bit for bit; and those of the
    trained model's reference are a plain model's."""
    trainer = dpo(folder, tmp_path / "a", gradient_checkpointing=checkpointing)
    trainer.train()
    losia, logs = trainer.model.losia, trainer.state.log_history
    assert losia.step == STEPS and losia.history
    assert logs[0]["rewards/margins"] == 0  # the adapter is the base yet
    assert logs[STEPS - 1]["rewards/margins"] > 0

    before = dpo(folder, tmp_path / "b", precompute_ref_log_probs=True)
    before.train()
    for mine, other in zip(logs[:STEPS], before.state.log_history, strict=False):
        assert mine["loss"] == other["loss"] and mine["grad_norm"] == other["grad_norm"]
    toys.equal_bits(toys.weights(losia), toys.weights(before.model.losia))

    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.ref_model = fresh = dpo(folder, tmp_path / "c").model.unload().eval()
    toys.equal_bits(found, trainer.compute_ref_log_probs(fresh, batch))


def test_a_peft_model_is_to_be_made_by_the_trainer(folder, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(model_of(folder), LosiaConfig(**SETTINGS))
    with pytest.raises(ValueError, match="in TRL, give peft_config to the trainer"):
        DPOTrainer(
            model=model, args=DPOConfig(**options(tmp_path)), train_dataset=preferences(),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
    assert isinstance(model.losia, losia_pro.Losia)
