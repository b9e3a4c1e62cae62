"""``losia.base()`` puts the base model's values in place and the tuned ones back, bit for bit both ways."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import toys
from runs import STEPS, Run
from torch.utils.checkpoint import checkpoint

import losia_pro
from losia_pro import LosiaConfig

CASES = {
    "fixed": {"period": None},
    "moves": {"period": 3},
    "moves that overlap": {"period": 1, "schedule": "sync", "rank_factor": 1 / 2},
    "biases": {"period": 3, "train_bias": True},
    "head": {"period": 2, "output_factor": 1 / 2},
    "tied head": {"period": 2, "output_factor": 1 / 2},
    "shared inputs": {"period": 2, "share_inputs": True},
    "calibrated": {"period": 3, "init": "calibrate"},
    "everything": {"period": None, "rank_factor": 1.0},
}
DTYPES = [torch.float32, torch.bfloat16]


def data_for(model, n, seed=7):
    if isinstance(model, toys.Words):
        return toys.texts(n, seed=seed)
    dtype = next(model.parameters()).dtype
    return [(x.to(dtype), y) for x, y in toys.batches(n, seed=seed)]


def start(settings, model):
    """A copy of ``model``, its controller and the bound optimizer."""
    before, data = copy.deepcopy(model), data_for(model, 2, seed=3)
    config = LosiaConfig(**{"rank_factor": 1 / 4, **settings})
    losia = losia_pro.attach(model, config, example=(data[0][0],))
    if config.init == "calibrate":
        losia.calibrate(data, toys.loss_of)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    return before, losia, optimizer


def model_for(case, dtype=torch.float32):
    return toys.words(dtype) if case == "tied head" else toys.stack(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_base_is_there_within_and_the_tuned_model_after(case, dtype):
    """After any step; and training goes on as if nothing had been."""
    settings, model = CASES[case], model_for(case, dtype)
    base, losia, optimizer = start(settings, model)
    other = model_for(case, dtype)
    _, _, same = start(settings, other)
    for batch in data_for(model, 10):
        list(toys.train(model, optimizer, [batch]))
        list(toys.train(other, same, [batch]))
        tuned = copy.deepcopy(model.state_dict())
        with losia.base(), torch.no_grad():
            toys.equal_bits(model.state_dict(), base.state_dict())
            assert torch.equal(model(batch[0]), base(batch[0]))
        toys.equal_bits(model.state_dict(), tuned)
    assert all(
        not torch.equal(base.get_submodule(n).weight, m.weight) for n, m in losia.modules.items()
    )
    toys.equal_bits(model.state_dict(), other.state_dict())


def test_each_entry_is_kept_once_however_often_a_subnet_comes_back():
    """On the CPU, in the weight's dtype; the entries are counted here from where the subnets have been."""
    settings = {"period": 1, "schedule": "sync", "rank_factor": 1 / 2}
    model = toys.stack(torch.bfloat16)
    _, losia, optimizer = start(settings, model)
    visited = {n: torch.zeros(m.weight.shape, dtype=torch.bool) for n, m in losia.modules.items()}
    for batch in [None, *data_for(model, 12)]:
        if batch is not None:
            list(toys.train(model, optimizer, [batch]))
        for n, (rows, columns) in toys.places(losia).items():
            visited[n][rows[:, None], columns] = True
    for n, m in losia.modules.items():
        kept = m.touched.values
        assert len(kept) == 13 and all(v.dtype == torch.bfloat16 for v in kept)
        assert sum(v.nbytes for v in kept) == 2 * int(visited[n].sum())
        assert all(v.device.type == "cpu" for v in kept)


@pytest.mark.parametrize("stop", [0, 2, 4, 9])
def test_a_resumed_run_has_the_first_runs_base(stop):
    """Its own model was another one before the states were loaded."""
    saved = Run().bind().go(0, stop).save()
    run = Run(seed=1).load(saved).bind()
    base = toys.stack(torch.bfloat16)
    for stage in range(2):
        tuned = copy.deepcopy(run.model.state_dict())
        with run.losia.base():
            toys.equal_bits(run.model.state_dict(), base.state_dict())
        toys.equal_bits(run.model.state_dict(), tuned)
        if stage == 0:
            run.go(stop, STEPS)


@pytest.mark.parametrize("calibrate", [False, True], ids=["random", "calibrated"])
@pytest.mark.parametrize("steps", [1, 12], ids=["blocks", "bitmap"])
def test_what_a_delta_brought_is_taken_away_too(steps, calibrate, tmp_path):
    """Loaded into the attached model, whose training then goes over the same entries."""
    base, first, optimizer = start(
        {"period": 1, "train_bias": True, "rank_factor": 1 / 8}, toys.stack()
    )
    list(toys.train(first.model, optimizer, data_for(first.model, steps)))
    first.save_delta(tmp_path / "d")
    model = copy.deepcopy(base)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 2, period=2, seed=1))
    losia_pro.load_delta(model, tmp_path / "d")
    if calibrate:
        losia.calibrate(data_for(model, 2), toys.loss_of)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    resumed = losia_pro.attach(copy.deepcopy(base), losia.config)
    for n_steps in (0, 5):
        list(toys.train(model, optimizer, data_for(model, n_steps)))
        resumed.model.load_state_dict(model.state_dict())
        resumed.load_state_dict(losia.state_dict())
        for run in (losia, resumed):
            with run.base():
                toys.equal_bits(run.model.state_dict(), base.state_dict())
            toys.equal_bits(run.model.state_dict(), model.state_dict())
    losia.save_delta(tmp_path / "both")
    toys.equal_bits(
        losia_pro.load_delta(copy.deepcopy(base), tmp_path / "both").state_dict(),
        model.state_dict(),
    )


def test_blocks_nest_and_an_exception_puts_the_tuned_values_back():
    model = toys.stack()
    base, losia, optimizer = start(CASES["moves"], model)
    list(toys.train(model, optimizer, data_for(model, 5)))
    tuned = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), losia.base():
        with pytest.raises(ZeroDivisionError), losia.base():
            toys.equal_bits(model.state_dict(), base.state_dict())
            1 / 0  # noqa: B018
        toys.equal_bits(model.state_dict(), base.state_dict())
        raise KeyError
    toys.equal_bits(model.state_dict(), tuned)


def test_a_block_that_cannot_be_entered_leaves_the_tuned_values(monkeypatch):
    model = toys.stack()
    _, losia, optimizer = start(CASES["moves"], model)
    list(toys.train(model, optimizer, data_for(model, 5)))
    tuned, calls = copy.deepcopy(model.state_dict()), []
    swap = losia_pro.base.Touched.swap

    def failing(touched, weight, bias):
        calls.append(touched)
        if len(calls) == 4:
            raise MemoryError
        swap(touched, weight, bias)

    monkeypatch.setattr(losia_pro.base.Touched, "swap", failing)
    with pytest.raises(MemoryError), losia.base():
        pytest.fail("entered")
    toys.equal_bits(model.state_dict(), tuned)


def calls_of(losia, optimizer, path):
    model, batch = losia.model, data_for(losia.model, 1)[0]
    module = losia.modules["layers.0.up"]
    return {
        "forward": lambda: model(batch[0]),
        "step": optimizer.step,
        "losia write_back": losia.write_back,
        "module write_back": module.write_back,
        "select": lambda: module.select(module.out_idx.flip(0), module.in_idx),
        "to_linear": module.to_linear,
        "save_delta": lambda: losia.save_delta(path / "new"),
        "load_delta": lambda: losia_pro.load_delta(model, path / "d"),
        "state_dict": losia.state_dict,
        "load_state_dict": lambda: losia.load_state_dict(torch.load(path / "losia")),
        "model load_state_dict": lambda: model.load_state_dict(torch.load(path / "model")),
        "detach": losia.detach,
        "calibrate": lambda: losia.calibrate([batch], toys.loss_of),
    }


@pytest.mark.parametrize("call", calls_of(start({}, toys.stack())[1], torch.optim.SGD, None))
def test_what_would_train_or_save_the_base_is_refused(call, tmp_path):
    settings = {"period": None, "train_bias": True}
    model = toys.stack()
    _, losia, optimizer = start(settings, model)
    losia.save_delta(tmp_path / "d")
    torch.save(losia.state_dict(), tmp_path / "losia")
    if call != "calibrate":  # it comes before training
        list(toys.train(model, optimizer, data_for(model, 3)))
    torch.save(model.state_dict(), tmp_path / "model")
    before = toys.snapshot(model)
    step, files = losia.step, sorted(tmp_path.iterdir())
    with losia.base():
        within = toys.snapshot(model)
        with pytest.raises(RuntimeError, match=r"inside losia\.base\(\)"):
            calls_of(losia, optimizer, tmp_path)[call]()
        toys.assert_same(within, toys.snapshot(model))
    toys.assert_same(before, toys.snapshot(model))
    assert losia.step == step and sorted(tmp_path.iterdir()) == files
    list(toys.train(model, optimizer, data_for(model, 1)))


def run_blocks(model, x, mode):
    for layer in model.layers:
        if mode is None:
            x = layer(x)
        else:
            x = checkpoint(layer, x, use_reentrant=mode == "reentrant")
    return model.head(model.norm(x))


@pytest.mark.parametrize("mode", [None, "reentrant", "non-reentrant"], ids=str)
def test_a_graph_from_before_the_block_is_good_after_it_and_refused_within(mode):
    """A preference loss calls the model, then the reference, then backward."""
    model = toys.stack()
    _, losia, optimizer = start(CASES["moves"], model)
    list(toys.train(model, optimizer, data_for(model, 4)))
    x, target = data_for(model, 1, seed=9)[0]
    x.requires_grad_()

    def gradients(between):
        optimizer.zero_grad()
        loss = (run_blocks(model, x, mode) - target).square().sum()
        between(loss)
        loss.backward()
        return [p.grad.clone() for p in losia.parameters()]

    def reference(loss):
        with losia.base(), torch.no_grad():
            model(x)

    def backward_within(loss):
        with losia.base():
            loss.backward()

    toys.equal_bits(gradients(reference), gradients(lambda loss: None))
    with pytest.raises(RuntimeError, match=r"modified|inside losia\.base"):
        gradients(backward_within)


def test_a_preference_loss_trains_as_with_a_second_copy_of_the_base():
    def train(reference):
        model = toys.words()
        base, losia, optimizer = start({"period": 2, "output_factor": 1 / 2}, model)
        for ids, target in data_for(model, 8):
            logits = model(ids)
            with torch.no_grad():
                if reference == "copy":
                    kept = base(ids)
                else:
                    with losia.base():
                        kept = model(ids)
            ratio = (logits.log_softmax(-1) - kept.log_softmax(-1)).gather(-1, target[..., None])
            (-torch.nn.functional.logsigmoid(ratio)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    toys.equal_bits(train("base"), train("copy"))


def test_a_compiled_model_sees_the_base_and_trains_on_without_compiling_anew():
    model = toys.stack()
    base, losia, optimizer = start(CASES["fixed"], model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    data = data_for(model, 8)
    x = data[0][0]
    for k, batch in enumerate(data):
        if k == 3:  # every graph is there
            torch._dynamo.config.error_on_recompile = True
        try:
            list(toys.train(compiled, optimizer, [batch]))
            with losia.base(), torch.no_grad():
                assert torch.equal(compiled(x), base(x))
        finally:
            torch._dynamo.config.error_on_recompile = False


def test_a_subnet_that_was_not_written_is_still_told_after_the_block():
    model = toys.stack()
    _, losia, _ = start({}, model)
    x = data_for(model, 1)[0][0]
    with torch.no_grad():
        losia.modules["layers.0.up"].subnet.add_(1)
        with losia.base(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    losia_pro.linear._warn_stale.cache_clear()
    with pytest.warns(UserWarning, match="not written into its dense weight"):
        model(x)
