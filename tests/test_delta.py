"""A delta turns its base model into the tuned one, bit for bit, and its file is whole or not there."""

from __future__ import annotations

import copy
import json
import os
import stat

import pytest
import safetensors.torch
import torch
import toys

import losia_pro
from losia_pro import LosiaConfig

WIDTH, HIDDEN = 64, 72


def stack(dtype=torch.float32, width=WIDTH, hidden=HIDDEN):
    return toys.stack(dtype, width=width, hidden=hidden)


def tuned(model, config, steps=9):
    """A plain copy of ``model`` from before, its controller after ``steps`` steps, and where each subnet has
    been, in order."""
    base = copy.deepcopy(model)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1, momentum=0.9)
    losia.bind(optimizer)
    been = {n: [place] for n, place in toys.places(losia).items()}
    if isinstance(model, toys.Words):
        data = toys.texts(steps)
    else:
        width, dtype = len(model.norm.weight), model.norm.weight.dtype
        data = [(x.to(dtype), y) for x, y in toys.batches(steps, width=width)]
    for _ in toys.train(model, optimizer, data):
        for r in losia.history[sum(len(b) - 1 for b in been.values()) :]:
            been[r.name].append(toys.places(losia)[r.name])
    return base, losia, been


def stored(path):
    with safetensors.safe_open(path, framework="pt") as f:
        return f.metadata(), {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118


CASES = {
    "fixed": {"period": None},
    "moves": {"period": 3},
    "many moves": {"period": 1, "schedule": "sync", "rank_factor": 1 / 2},
    "biases": {"period": 3, "train_bias": True},
    "head": {"period": 2, "output_factor": 1 / 2},
    "few inputs, all outputs": {"period": 3, "in_factor": 1 / 8, "out_factor": 1.0},
    "all inputs, few outputs": {"period": 3, "in_factor": 1.0, "out_factor": 1 / 8},
    "everything": {"period": None, "rank_factor": 1.0},
    "one linear": {"period": 2, "target_modules": ["layers.1.up"]},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_delta_makes_the_tuned_model_of_its_base(case, dtype, tmp_path):
    config = LosiaConfig(**{"rank_factor": 1 / 4, **CASES[case]})
    base, losia, _ = tuned(stack(dtype), config)
    expected = losia.model.state_dict()
    for n in losia.modules:
        assert not torch.equal(base.get_submodule(n).weight, expected[f"{n}.weight"])
    losia.save_delta(tmp_path / "d.safetensors")
    if case in ("fixed", "many moves"):
        form = "blocks" if case == "fixed" else "bitmap"
        header, _ = stored(tmp_path / "d.safetensors")
        assert set(json.loads(header["modules"]).values()) == {form}
    assert losia_pro.load_delta(base, tmp_path / "d.safetensors") is base
    toys.equal_bits(base.state_dict(), expected)
    assert all(type(m) is torch.nn.Linear for n, m in base.named_modules() if n in losia.modules)


def test_a_delta_of_a_tied_head_moves_the_embedding_too(tmp_path):
    base, losia, _ = tuned(
        toys.words(), LosiaConfig(rank_factor=1 / 4, period=2, output_factor=0.5)
    )
    losia.save_delta(tmp_path / "d")
    losia_pro.load_delta(base, tmp_path / "d")
    assert base.embed.weight is base.lm_head.weight
    assert torch.equal(base.embed.weight, losia.model.embed.weight)
    toys.equal_bits(base.state_dict(), losia.model.state_dict())


def test_a_delta_saved_before_any_step_changes_nothing(tmp_path):
    base, losia, _ = tuned(stack(torch.bfloat16), LosiaConfig(rank_factor=1 / 4), steps=0)
    losia.save_delta(tmp_path / "d")
    toys.equal_bits(
        losia_pro.load_delta(copy.deepcopy(base), tmp_path / "d").state_dict(), base.state_dict()
    )


def test_a_delta_saved_after_detach_is_the_same(tmp_path):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4, period=2))
    losia.save_delta(tmp_path / "before")
    losia.detach()
    losia.save_delta(tmp_path / "after")
    toys.equal_bits(stored(tmp_path / "before"), stored(tmp_path / "after"))


# 63 x 65 entries are no multiple of 8: the bitmap's last byte is part padding.
@pytest.mark.parametrize("sizes", [{}, {"width": 63, "hidden": 65}], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 12])
def test_each_linear_takes_the_smaller_of_the_two_forms(steps, dtype, sizes, tmp_path):
    """Sizes are counted here from where the subnets have been."""
    config = LosiaConfig(rank_factor=1 / 3, period=1, schedule="sync")
    base, losia, been = tuned(stack(dtype, **sizes), config, steps)
    losia.save_delta(tmp_path / "d")
    header, tensors = stored(tmp_path / "d")
    forms = json.loads(header["modules"])
    for n, m in losia.modules.items():
        entry = m.weight.element_size()
        visited = torch.zeros(m.weight.shape, dtype=torch.bool)
        blocks = 0
        for rows, columns in been[n]:
            visited[rows[:, None], columns] = True
            blocks += len(rows) * len(columns) * entry + 8 * (len(rows) + len(columns))
        bitmap = int(visited.sum()) * entry + (m.weight.numel() + 7) // 8
        size = sum(t.nbytes for k, t in tensors.items() if k.startswith(n + "."))
        assert size == min(blocks, bitmap)
        assert forms[n] == ("blocks" if blocks <= bitmap else "bitmap")
    assert set(forms.values()) == {"bitmap" if steps else "blocks"}
    losia_pro.load_delta(base, tmp_path / "d")
    toys.equal_bits(base.state_dict(), losia.model.state_dict())


def test_the_file_is_plain_safetensors_with_a_readable_header(tmp_path):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4, period=None))
    losia.save_delta(tmp_path / "d")
    header, tensors = stored(tmp_path / "d")
    assert (header["format"], header["version"]) == ("losia-pro-delta", "2")
    assert LosiaConfig(**json.loads(header["config"])) == losia.config
    assert json.loads(header["modules"]) == dict.fromkeys(losia.modules, "blocks")
    parts = ("out_idx", "in_idx", "values")
    assert tensors.keys() == {f"{n}.{part}.0" for n in losia.modules for part in parts}
    m = losia.modules["layers.0.up"]
    assert torch.equal(tensors["layers.0.up.out_idx.0"], m.out_idx)
    assert torch.equal(tensors["layers.0.up.values.0"], m.subnet)


def test_a_delta_loads_into_an_attached_model(tmp_path):
    """Whose own subnets lie elsewhere: they take over the tuned values, and training goes on from there."""
    config = LosiaConfig(rank_factor=1 / 4, period=3)
    base, losia, _ = tuned(stack(torch.bfloat16), config)
    losia.save_delta(tmp_path / "d")
    other = losia_pro.attach(base, LosiaConfig(rank_factor=1 / 2, period=None, seed=1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.bind(optimizer)
    losia_pro.load_delta(base, tmp_path / "d")
    toys.equal_bits(base.state_dict(), losia.model.state_dict())
    for m in other.modules.values():
        assert torch.equal(m.subnet, m.weight[m.out_idx][:, m.in_idx].float())
    optimizer.step()  # no gradients: the write-back alone
    toys.equal_bits(base.state_dict(), losia.model.state_dict())
    batch = toys.batches(1, width=WIDTH)[0]
    list(toys.train(base, optimizer, [(batch[0].bfloat16(), batch[1])]))
    toys.equal_bits(other.detach().state_dict(), base.state_dict())
    assert not torch.equal(base.layers[0].up.weight, losia.model.layers[0].up.weight)


@pytest.mark.parametrize("steps", [2, 40], ids=["blocks", "bitmap"])
def test_a_delta_saved_after_another_was_loaded_holds_both(tmp_path, steps):
    config = LosiaConfig(rank_factor=1 / 4, period=1, train_bias=True)
    base, first, _ = tuned(stack(torch.bfloat16), config, steps)
    first.save_delta(tmp_path / "1")
    plain = LosiaConfig(rank_factor=1 / 4, period=None, seed=1)
    loaded, resumed = (losia_pro.attach(copy.deepcopy(base), plain) for _ in range(2))
    losia_pro.load_delta(loaded.model, tmp_path / "1")
    resumed.model.load_state_dict(loaded.model.state_dict())
    resumed.load_state_dict(loaded.state_dict())
    for losia in (loaded, resumed):
        losia.save_delta(tmp_path / "2")
        again = losia_pro.load_delta(copy.deepcopy(base), tmp_path / "2")
        toys.equal_bits(again.state_dict(), first.model.state_dict())


def failing(*_, **__):
    raise OSError("no space left on device")


def half_written(tensors, filename, metadata=None):
    with open(filename, "wb") as f:
        f.write(b"half")
    failing()


FAILURES = {
    "save_file": (safetensors.torch, "save_file", half_written),
    "replace": (os, "replace", failing),
    "fsync": (os, "fsync", failing),
}


@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize(("module", "function", "fail"), FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_leaves_what_was_there(
    module, function, fail, there, tmp_path, monkeypatch
):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4))
    path = tmp_path / "d.safetensors"
    if there:
        path.write_bytes(b"the old one")
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(OSError, match="no space left"):
        losia.save_delta(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if there else [])
    assert not there or path.read_bytes() == b"the old one"


def test_the_file_and_then_its_name_are_on_the_disk_before_save_returns(tmp_path, monkeypatch):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4))
    happened = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        happened.append(("fsync", os.fstat(handle).st_ino, os.fstat(handle).st_mode))
        fsync(handle)

    def watched_replace(source, target):
        happened.append(("replace", str(target), os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    path = tmp_path / "d"
    losia.save_delta(path)
    ours = [h for h in happened if h[1] in (path.stat().st_ino, tmp_path.stat().st_ino, str(path))]
    assert [h[0] for h in ours] == ["fsync", "replace", "fsync"]
    assert ours[0][1] == path.stat().st_ino == ours[1][2]
    assert stat.S_ISDIR(ours[2][2]) and ours[2][1] == tmp_path.stat().st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_file_can_be_read_by_whom_the_umask_allows(mask, tmp_path):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4), steps=0)
    before = os.umask(mask)
    try:
        losia.save_delta(tmp_path / "d")
        (tmp_path / "new").touch()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("d", "new")]
    assert modes[0] == modes[1] == stat.S_IFREG | 0o666 & ~mask


def test_saving_replaces_the_file_that_was_there(tmp_path, monkeypatch):
    """Also by a relative name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4))
    losia.save_delta("d")
    first = stored(tmp_path / "d")
    (tmp_path / "d").write_bytes(b"something else")
    losia.save_delta("d")
    toys.equal_bits(stored(tmp_path / "d"), first)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4), steps=0)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        losia.save_delta(tmp_path / "nowhere" / "d")
    assert not list(tmp_path.iterdir())


def other_weight(losia):
    """Loads another fine-tune, which differs from the base in one entry that is in no subnet."""
    state = losia.model.state_dict()
    weight = state["layers.1.up.weight"] = state["layers.1.up.weight"].clone()
    trained = torch.zeros_like(weight, dtype=torch.bool)
    for out_idx, in_idx in losia.touched("layers.1.up"):
        trained[out_idx[:, None], in_idx] = True
    weight[tuple((~trained).nonzero()[0])] += 1
    losia.model.load_state_dict(state)


def other_bias(losia):
    losia.model.layers[0].up.bias.data[3] += 1


def other_dtype(losia):
    losia.model.double()


@pytest.mark.parametrize("change", [other_weight, other_bias, other_dtype])
def test_weights_that_were_loaded_over_the_base_are_noticed(change, tmp_path):
    _, losia, _ = tuned(stack(), LosiaConfig(rank_factor=1 / 4, period=3))
    change(losia)
    before = toys.snapshot(losia.model)
    with pytest.raises(RuntimeError, match="loaded or changed after attach"):
        losia.save_delta(tmp_path / "d")
    assert not list(tmp_path.iterdir())
    toys.assert_same(before, toys.snapshot(losia.model))


def test_a_checkpoint_of_the_run_itself_is_no_other_base(tmp_path):
    config = LosiaConfig(rank_factor=1 / 4, period=3, train_bias=True)
    _, losia, _ = tuned(stack(), config)
    losia.save_delta(tmp_path / "d")
    again = losia_pro.attach(stack(), config)
    again.model.load_state_dict(losia.model.state_dict())
    again.load_state_dict(losia.state_dict())
    again.save_delta(tmp_path / "again")
    toys.equal_bits(stored(tmp_path / "again"), stored(tmp_path / "d"))
