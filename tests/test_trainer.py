"""LosiaCallback: Hugging Face Trainer trains exactly the subnets, logs moves, and resumes bitwise."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback
from losia_pro.sharded import whole

VOCABULARY, STEPS = 64, 14


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True, attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dataset(n: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (12,), generator=generator) for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
            "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "seed": 3,
            **changes,
        }
    )  # fmt: skip


CONFIG = losia_pro.LosiaConfig(rank_factor=1 / 4, period=3)


class StopAt(TrainerCallback):
    """Stops after a step as Ctrl-C in a script would: with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(folder, *, stop_at=None, resume=None, config=CONFIG, model=None, **changes):
    model = model or tiny_llama()
    losia = losia_pro.attach(model, config)
    callbacks = [LosiaCallback(losia), *([StopAt(stop_at)] if stop_at else [])]
    trainer = Trainer(
        model, arguments(folder, **changes), train_dataset=dataset(), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return losia, trainer


def entries(losia) -> dict[str, torch.Tensor]:
    return {name: whole(m.weight).cpu().clone() for name, m in losia.modules.items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_trainer_moves_only_entries_that_were_in_a_subnet(whole_run):
    losia, _ = whole_run
    before = dict(tiny_llama().named_parameters())
    assert losia.step == STEPS and losia.history
    for name, parameter in losia.model.named_parameters():
        if name.endswith("subnet"):
            continue
        changed = parameter.detach() != before[name].detach()
        module = name.removesuffix(".weight")
        if module in losia.modules:
            was_in = torch.zeros_like(changed)
            for out_idx, in_idx in losia.touched(module):
                was_in[out_idx[:, None], in_idx] = True
            assert changed.any() and not changed[~was_in].any(), name
        else:
            assert not changed.any(), name


def test_trainer_equals_an_ordinary_loop(tmp_path):
    losia, _ = train(tmp_path / "trainer", gradient_accumulation_steps=1, max_grad_norm=0.5)
    # The same data order, optimizer, clipping and scheduler by hand.
    model = tiny_llama()
    by_hand = losia_pro.attach(model, CONFIG)
    args = arguments(tmp_path / "loop", gradient_accumulation_steps=1)
    other = Trainer(model, args, train_dataset=dataset())
    optimizer = other.create_optimizer()
    scheduler = other.create_scheduler(STEPS)
    by_hand.bind(optimizer)
    torch.manual_seed(3)
    model.train()
    for batch, _ in zip(other.get_train_dataloader(), range(STEPS), strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert by_hand.history == losia.history
    for name, weight in entries(by_hand).items():
        torch.testing.assert_close(weight, losia.modules[name].weight, rtol=0, atol=1e-6)


# Before and after a re-selection, in the middle of profiling and of rewarming (period 3).
@pytest.mark.parametrize("step", [1, 3, 5, 9, 13])
def test_resume_is_bitwise_equal(whole_run, tmp_path, step):
    losia, trainer = whole_run
    train(tmp_path, stop_at=step)
    resumed, again = train(tmp_path, resume=True)
    assert resumed.step == STEPS
    assert resumed.history == losia.history
    assert equal(entries(resumed), entries(losia))
    for name, module in losia.modules.items():
        assert torch.equal(module.subnet, resumed.modules[name].subnet), name
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == [log["loss"] for log in again.state.log_history if "loss" in log]


def test_resume_finds_the_state_when_the_checkpoint_was_moved(whole_run, tmp_path):
    losia, _ = whole_run
    train(tmp_path / "first", stop_at=4)
    moved = shutil.move(tmp_path / "first" / "checkpoint-4", tmp_path / "elsewhere")
    resumed, _ = train(tmp_path / "second", resume=str(moved))
    assert equal(entries(resumed), entries(losia))


def test_resume_of_a_bf16_model_is_bitwise_equal(tmp_path):
    whole, _ = train(tmp_path / "a", model=tiny_llama().to(torch.bfloat16))
    train(tmp_path / "b", stop_at=5, model=tiny_llama().to(torch.bfloat16))
    resumed, _ = train(tmp_path / "b", resume=True, model=tiny_llama().to(torch.bfloat16))
    for name, module in whole.modules.items():
        assert torch.equal(module.subnet, resumed.modules[name].subnet), name
        assert torch.equal(module.weight, resumed.modules[name].weight), name


def test_reselections_appear_in_the_logs(whole_run, tmp_path):
    losia, trainer = whole_run
    logged = {log["step"]: log for log in trainer.state.log_history if "losia_moved" in log}
    assert sorted(logged) == sorted({r.step for r in losia.history}) == [3, 6, 9, 12]
    for step, log in logged.items():
        moved = [r for r in losia.history if r.step == step]
        assert log["losia_moved"] == len(moved) == 7
        assert log["losia_overlap"] == pytest.approx(sum(r.overlap for r in moved) / 7)
        assert log["losia_score_kept"] == pytest.approx(sum(r.score_kept for r in moved) / 7)
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "losia_overlap" in (tmp_path / "state.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logs_tell_how_many_updates_a_16_bit_weight_would_lose(tmp_path, dtype):
    """Judged by the weights before and after the last step of each slot."""
    losia = losia_pro.attach(tiny_llama().to(dtype), CONFIG)
    before, expected = {}, []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for n, m in losia.modules.items():
                at = m.out_idx[:, None].clone(), m.in_idx.clone()
                before[n] = at, m.weight.detach()[at].clone()

        def on_step_end(self, *args, **kwargs):
            for r in losia.history[len(expected) :]:
                at, weight = before[r.name]
                same = losia.modules[r.name].weight.detach()[at] == weight
                expected.append(same.double().mean().item() if dtype == torch.bfloat16 else 0.0)

    args = arguments(tmp_path, learning_rate=2e-4, weight_decay=0.1)
    callbacks = [LosiaCallback(losia), Watch()]
    trainer = Trainer(losia.model, args, train_dataset=dataset(), callbacks=callbacks)
    trainer.train()
    found = [r.lost_to_rounding for r in losia.history]
    assert found == pytest.approx(expected) and len(found) == 4 * 7
    assert (min(found) > 0.1) == (dtype == torch.bfloat16)
    logged = [g["losia_lost_to_rounding"] for g in trainer.state.log_history if "losia_moved" in g]
    assert logged == pytest.approx([sum(found[i : i + 7]) / 7 for i in range(0, 28, 7)])


def test_trackers_see_the_keys(tmp_path, monkeypatch):
    seen = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen[state.global_step] = dict(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    losia = losia_pro.attach(tiny_llama(), CONFIG)
    args = arguments(tmp_path, report_to="tensorboard")
    trainer = Trainer(losia.model, args, train_dataset=dataset())
    LosiaCallback(losia).add_to(trainer)
    trainer.train()
    assert sorted(step for step in seen if "losia_overlap" in seen[step]) == [3, 6, 9, 12]
    for step in range(1, STEPS + 1):  # one of the three groups, over the three steps after its move
        factor = ((step - 1) % 3 + 1) / 3 if step > 3 else 1
        assert seen[step]["losia_rewarm"] == pytest.approx((2 + factor) / 3)


def test_a_checkpoint_is_readable_without_pickle(tmp_path):
    train(tmp_path, stop_at=2)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["state"]["losia"]["step"] == 2
    weights = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert weights["architectures"] == ["LlamaForCausalLM"]
    LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")  # a plain model reads it


def test_a_checkpoint_without_losia_state_is_refused(tmp_path):
    trainer = Trainer(
        tiny_llama(), arguments(tmp_path), train_dataset=dataset(), callbacks=[StopAt(2)]
    )
    trainer.train()
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    losia = losia_pro.attach(tiny_llama(), CONFIG)
    again = Trainer(
        losia.model, arguments(tmp_path), train_dataset=dataset(), callbacks=[LosiaCallback(losia)]
    )
    path.unlink()
    with pytest.raises(ValueError, match="holds no LoSiA state"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(tmp_path, stop_at=2)
    other = losia_pro.LosiaConfig(rank_factor=1 / 4, period=5)
    with pytest.raises(ValueError, match="period=3"):
        train(tmp_path, resume=True, config=other)


def test_a_controller_of_another_model_is_refused(tmp_path):
    losia = losia_pro.attach(tiny_llama(), CONFIG)
    detached = losia_pro.attach(tiny_llama(), CONFIG)
    callbacks = ((LosiaCallback(losia), tiny_llama()), (LosiaCallback(detached), detached.detach()))
    for callback, model in callbacks:
        trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset(), callbacks=[callback])
        with pytest.raises(ValueError, match="not the one that LosiaCallback's controller adapts"):
            trainer.train()


def test_a_head_that_the_loss_goes_around_is_refused(tmp_path):
    """As TRL 1.16's trainers do: they multiply by its weight."""

    class Around(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            hidden = model.model(inputs["input_ids"]).last_hidden_state
            logits = hidden @ model.lm_head.weight.T
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), inputs["labels"].flatten()
            )

    for factor, outcome in ((0.0, None), (1 / 2, "output head's weight.*use output_factor=0")):
        config = losia_pro.LosiaConfig(rank_factor=1 / 4, output_factor=factor)
        losia = losia_pro.attach(tiny_llama(), config)
        args = arguments(tmp_path, max_steps=1)
        trainer = Around(
            losia.model, args, train_dataset=dataset(), callbacks=[LosiaCallback(losia)]
        )
        if outcome is None:
            trainer.train()
        else:
            with pytest.raises(ValueError, match=outcome):
                trainer.train()


def test_data_parallel_in_one_process_is_refused(tmp_path):
    losia = losia_pro.attach(tiny_llama(), CONFIG)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel.*torchrun --nproc_per_node 2"):
        LosiaCallback(losia).on_train_begin(args, None, None, optimizer=None)
