"""Deltas of two tasks on one base, put on and taken off in place, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import toys

import losia_pro
from losia_pro import Delta, LosiaConfig

CASES = {
    "blocks": {"period": None, "rank_factor": 1 / 8},
    "places that overlap": {"period": 2, "rank_factor": 1 / 2},
    "bitmap": {"period": 1, "schedule": "sync"},
    "biases": {"period": 3, "train_bias": True},
    "tied head": {"period": 2, "output_factor": 1 / 2},
}
DTYPES = [torch.float32, torch.bfloat16]


def base(case: str, dtype: torch.dtype) -> torch.nn.Module:
    model = toys.words(dtype) if case == "tied head" else toys.stack(dtype)
    return model.requires_grad_(False)


def task(model, settings, seed, path):
    """Write the delta of one task; returns the tuned model's values."""
    losia = losia_pro.attach(model, LosiaConfig(**{"rank_factor": 1 / 4, "seed": seed, **settings}))
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1, momentum=0.9)
    losia.bind(optimizer)
    dtype = next(model.parameters()).dtype
    if isinstance(model, toys.Words):
        data = toys.texts(7, seed=seed)
    else:
        data = [(x.to(dtype), y) for x, y in toys.batches(7, seed=seed)]
    list(toys.train(model, optimizer, data))
    losia.save_delta(path)
    return copy.deepcopy(losia.detach().state_dict())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_tasks_take_turns_on_one_base(case, dtype, tmp_path):
    tuned = [task(base(case, dtype), CASES[case], k, tmp_path / str(k)) for k in range(2)]
    deltas = [Delta(tmp_path / str(k)) for k in range(2)]
    model = base(case, dtype)
    untouched, places = copy.deepcopy(model.state_dict()), where(model)
    for k in (0, 1, 1, 0):
        assert deltas[k].apply(model) is model
        toys.equal_bits(model.state_dict(), tuned[k])
        deltas[k].remove()
        toys.equal_bits(model.state_dict(), untouched)
    assert where(model) == places  # in place: compiled and captured graphs stay good


def where(model) -> dict[str, tuple[int, int]]:
    return {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}


def test_tasks_are_exchanged_under_a_compiled_models_inference(tmp_path):
    """Between two requests: nothing is compiled anew, and each is answered by its task's model."""
    x = torch.randn(5, toys.IN, generator=torch.Generator().manual_seed(0))
    expected, deltas = {None: toys.stack()(x)}, {}
    for k in (1, 2):
        model = toys.stack()
        task(model, {"period": 2, "train_bias": True}, k, tmp_path / str(k))
        expected[k], deltas[k] = model(x), Delta(tmp_path / str(k))
    assert not torch.equal(expected[1], expected[2])
    torch._dynamo.reset()
    model, now = toys.stack().requires_grad_(False).eval(), None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), expected[None])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for wanted in (1, 2, None, 2, 1):
                if now is not None:
                    deltas[now].remove()
                if wanted is not None:
                    deltas[wanted].apply(model)
                now = wanted
                assert torch.equal(compiled(x), expected[wanted])
    torch._dynamo.reset()


def test_a_second_delta_on_top_is_refused_and_changes_nothing(tmp_path):
    for k in range(2):
        task(toys.stack(), {}, k, tmp_path / str(k))
    first, second = Delta(tmp_path / "0"), Delta(tmp_path / "1")
    model = first.apply(toys.stack())
    before = toys.snapshot(model)
    for refuse, error, message in (
        (lambda: second.apply(model), ValueError, "made from other weights"),
        (
            lambda: losia_pro.load_delta(model, tmp_path / "1"),
            ValueError,
            "made from other weights",
        ),
        (lambda: first.apply(model), RuntimeError, "applied already"),
        (second.remove, RuntimeError, "not applied"),
    ):
        with pytest.raises(error, match=message):
            refuse()
        toys.assert_same(before, toys.snapshot(model))
    first.remove()
    toys.equal_bits(model.state_dict(), toys.stack().state_dict())
    toys.equal_bits(
        second.apply(model).state_dict(),
        losia_pro.load_delta(toys.stack(), tmp_path / "1").state_dict(),
    )


@pytest.mark.parametrize("form", ["blocks", "bitmap"])
@pytest.mark.parametrize("what", ["weight", "bias", "zero's sign", "dtype"])
def test_a_delta_is_not_taken_off_weights_that_changed_since(form, what, tmp_path):
    task(toys.stack(), {**CASES[form], "train_bias": True}, 0, tmp_path / "d")
    delta, model = Delta(tmp_path / "d"), toys.stack()
    if what == "zero's sign":  # equal as numbers, not as bits
        next(t for k, t in delta._tensors.items() if "0.up.values" in k).view(-1)[0] = 0.0
    delta.apply(model)
    up = model.layers[0].up
    with torch.no_grad():
        if what == "weight":
            at = (up.weight != toys.stack().layers[0].up.weight).nonzero()[0]
            up.weight[tuple(at)] += 1
        elif what == "bias":
            up.bias[3] += 1
        elif what == "zero's sign":
            up.weight[up.weight == 0] = -0.0
        else:
            model.double()
    before = toys.snapshot(model)
    with pytest.raises(RuntimeError, match="changed since"):
        delta.remove()
    toys.assert_same(before, toys.snapshot(model))


def test_not_a_number_is_taken_off_too(tmp_path):
    task(toys.stack(), {}, 0, tmp_path / "d")
    delta, model = Delta(tmp_path / "d"), toys.stack()
    next(t for k, t in delta._tensors.items() if "up.values" in k).fill_(torch.nan)
    delta.apply(model)
    assert any(p.isnan().any() for p in model.parameters())
    delta.remove()
    toys.equal_bits(model.state_dict(), toys.stack().state_dict())


def test_a_model_under_training_is_left_to_load_delta(tmp_path):
    task(toys.stack(), {}, 0, tmp_path / "d")
    delta = Delta(tmp_path / "d")
    attached = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4)).model
    before = toys.snapshot(attached)
    with pytest.raises(ValueError, match="load_delta"):
        delta.apply(attached)
    toys.assert_same(before, toys.snapshot(attached))
    model = delta.apply(toys.stack())
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4))
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="load_delta"):
        delta.remove()
    toys.assert_same(before, toys.snapshot(model))
    losia.detach()
    delta.remove()
    toys.equal_bits(model.state_dict(), toys.stack().state_dict())


def test_a_file_that_is_no_delta_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such delta file"):
        Delta(tmp_path / "d")
    (tmp_path / "d").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Delta(tmp_path / "d")
