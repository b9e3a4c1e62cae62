"""losia_pro.peft: PEFT trains, saves, loads, merges and switches off a LoSiA adapter, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
import toys
from cli_tools import make_model
from peft import PeftModel, get_peft_model
from test_models import causal_lm
from test_trainer import STEPS, StopAt, arguments, dataset, tiny_llama
from test_trainer import train as train_without_peft
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, Trainer

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback
from losia_pro.peft import LosiaConfig

SETTINGS = {"rank_factor": 1 / 4, "period": 3}
IDS = torch.stack([row["input_ids"] for row in dataset(4)])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(dtype=torch.float32, steps=8, **settings):
    """A base model, and a trained PEFT model of it."""
    base = tiny_llama().to(dtype)
    model = get_peft_model(copy.deepcopy(base), LosiaConfig(**{**SETTINGS, **settings}))
    optimizer = torch.optim.AdamW(model.losia.parameters(), lr=1e-2)
    model.losia.bind(optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return base, model, optimizer


def step(model, optimizer) -> None:
    model.train()
    torch.manual_seed(0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(folder, *, stop_at=None, resume=None, **changes):
    model = get_peft_model(tiny_llama(), LosiaConfig(**SETTINGS))
    callbacks = [LosiaCallback(), *([StopAt(stop_at)] if stop_at else [])]
    args = arguments(folder, **changes)
    trainer = Trainer(model, args, train_dataset=dataset(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_trainer_trains_it_as_it_trains_an_attached_model(whole_run, tmp_path):
    losia, trainer = train_without_peft(tmp_path)
    model, peft_trainer = whole_run
    assert model.losia.step == STEPS and model.losia.history == losia.history
    toys.equal_bits(toys.weights(model.losia), toys.weights(losia))
    losses = [log["loss"] for log in peft_trainer.state.log_history if "loss" in log]
    assert losses == [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(whole_run, tmp_path, stop):
    model, _ = whole_run
    train(tmp_path, stop_at=stop)
    saved = tmp_path / f"checkpoint-{stop}"
    assert not (saved / "model.safetensors").exists()
    resumed, _ = train(tmp_path, resume=True)
    assert resumed.losia.history == model.losia.history
    toys.equal_bits(toys.weights(resumed.losia), toys.weights(model.losia))
    for name, module in model.losia.modules.items():
        assert torch.equal(module.subnet, resumed.losia.modules[name].subnet), name


def test_it_is_evaluated_before_it_is_trained_and_made_anew_for_each_run(tmp_path):
    def make(trial=None):
        return get_peft_model(tiny_llama(), LosiaConfig(**SETTINGS))

    trainer = Trainer(
        args=arguments(tmp_path, max_steps=4), model_init=make, train_dataset=dataset(),
        eval_dataset=dataset(4), callbacks=[LosiaCallback()],
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    first = trainer.model.losia
    trainer.train()  # as hyperparameter_search does
    second = trainer.model.losia
    assert first is not second and first.step == second.step == 4
    assert [r.name for r in first.history] == [r.name for r in second.history]


CASES = {
    "moves": {},
    "fixed": {"period": None},
    "biases": {"train_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "head": {"output_factor": 1 / 2},
    "shared inputs": {"share_inputs": True},
}


def with_biases(model):
    """Biases on the linears, of ones, for there are none in a Llama."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.bias = torch.nn.Parameter(
                torch.ones(module.out_features, dtype=module.weight.dtype)
            )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_saved_loaded_switched_off_merged_and_unloaded(tmp_path, monkeypatch, case, dtype):
    if case == "biases":
        plain = tiny_llama
        monkeypatch.setitem(globals(), "tiny_llama", lambda: with_biases(plain()))
    base, model, _ = adapted(dtype, **CASES[case])
    tuned, untouched = logits(model), logits(base)
    assert not torch.equal(tuned, untouched)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    for peft_model in (model, loaded):
        assert torch.equal(logits(peft_model), tuned)
        with peft_model.disable_adapter():
            assert torch.equal(logits(peft_model), untouched)
        assert torch.equal(logits(peft_model), tuned)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's advice on tied weights is not for us
        merged = loaded.merge_and_unload()
    assert type(merged) is type(base) and torch.equal(logits(merged), tuned)
    assert loaded.merge_and_unload() is merged and torch.equal(logits(merged), tuned)
    assert not any(isinstance(m, losia_pro.SubnetLinear) for m in merged.modules())
    assert merged.state_dict().keys() == base.state_dict().keys()

    unloaded = model.unload()
    toys.equal_bits(dict(unloaded.state_dict()), dict(base.state_dict()))
    assert not hasattr(unloaded, "peft_config")


@pytest.mark.parametrize("kind", ["GPT2", "Mixtral"])
def test_transposed_linears_and_experts_too(tmp_path, kind):
    base = causal_lm(kind)
    model = get_peft_model(copy.deepcopy(base), LosiaConfig(**SETTINGS))
    optimizer = torch.optim.AdamW(model.losia.parameters(), lr=1e-2)
    model.losia.bind(optimizer)
    for _ in range(4):
        step(model, optimizer)
    tuned, untouched = logits(model), logits(base)
    assert model.losia.history and not torch.equal(tuned, untouched)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), tuned)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), untouched)
    assert torch.equal(logits(loaded.merge_and_unload()), tuned)
    toys.equal_bits(dict(model.unload().state_dict()), dict(base.state_dict()))


def test_a_loaded_adapter_is_saved_as_it_was(tmp_path):
    base, model, _ = adapted(steps=14)
    model.save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(base, tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_adapter_holds_the_trained_places_and_no_more(tmp_path):
    _, model, _ = adapted(torch.bfloat16, period=None, rank_factor=1 / 8)
    model.save_pretrained(tmp_path)
    entries = sum(p.numel() for p in model.losia.parameters())
    neurons = sum(m.out_idx.numel() + m.in_idx.numel() for m in model.losia.modules.values())
    header = 400 * len(
        model.losia.modules
    )  # names, dtypes, shapes and offsets of three tensors each
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - (2 * entries + 8 * neurons + 32) <= header


def test_a_model_that_is_trained_can_be_pickled(tmp_path):
    _, model, optimizer = adapted(steps=4)
    tuned = logits(model)
    torch.save(model, tmp_path / "model.pt")
    copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(copied), tuned)
    its_optimizer = torch.optim.AdamW(copied.losia.parameters(), lr=1e-2)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied.losia.bind(its_optimizer)
    for m, o in ((model, optimizer), (copied, its_optimizer)):
        for _ in range(4):
            step(m, o)
    assert copied.losia.history == model.losia.history
    toys.equal_bits(toys.weights(copied.losia), toys.weights(model.losia))


def test_loading_over_a_trained_adapter_leaves_nothing_of_it(tmp_path):
    """As Trainer does with load_best_model_at_end."""
    base, model, optimizer = adapted(steps=2)
    then = logits(model)
    model.save_pretrained(tmp_path)
    for _ in range(6):
        step(model, optimizer)
    assert model.losia.history and not torch.equal(logits(model), then)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), then)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    step(model, optimizer)
    assert not torch.equal(logits(model), then)


def test_a_new_process_loads_it_with_its_base_model(tmp_path):
    folder = make_model(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LosiaConfig(rank_factor=1 / 4, task_type="CAUSAL_LM"),
    )
    for p in model.losia.parameters():
        p.data.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""if True:
        import sys, losia_pro
        assert "peft" not in sys.modules
        losia_pro.peft.LosiaConfig
        from peft import AutoPeftModelForCausalLM
        import torch
        model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
        torch.save(model.merge_and_unload().state_dict(), {str(tmp_path / "merged.pt")!r})"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    toys.equal_bits(
        dict(torch.load(tmp_path / "merged.pt")), dict(model.merge_and_unload().state_dict())
    )


@pytest.mark.parametrize("how", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_a_classifier_is_trained_and_saved_whole(tmp_path, how):
    config = copy.deepcopy(tiny_llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config)
    model = get_peft_model(copy.deepcopy(base), LosiaConfig(**SETTINGS, **how))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.losia.bind(optimizer)
    for _ in range(4):
        model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    tuned = logits(model)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), tuned)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(base))
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), tuned)
    assert not torch.equal(merged.score.weight, base.score.weight)


def test_data_parallel_leaves_the_indices_alone():
    _, model, _ = adapted(steps=0)
    buffers = {n for n, _ in model.named_buffers() if n.endswith(("in_idx", "out_idx"))}
    assert buffers and set(model._ddp_params_and_buffers_to_ignore) == buffers
