"""Tables of measured launch shapes: which file is read, what is refused, and what is kept. No GPU needed."""

from __future__ import annotations

import argparse
import json
import re
import types
import warnings

import pytest
import torch

from losia_pro import LosiaConfig
from losia_pro.cli import main, tune

tuned = pytest.importorskip("losia_pro.kernels.tuned")

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROW = {"op": "subnet_grad", "dtype": "bfloat16", "n_out": 512, "n_in": 256, "run": 8}
ROW["tiles"] = [64, 128, 64, 4, 3]
SIZES = "subnet_grad", BF16, 512, 256, 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    tuned.table.cache_clear()
    yield tmp_path
    tuned.table.cache_clear()


def test_a_kernel_finds_what_was_measured_for_its_sizes():
    assert tuned.lookup(CPU, *SIZES) is None
    tuned.write(tuned.path(CPU), tuned.header(CPU), [ROW])
    assert tuned.lookup(CPU, *SIZES) is None  # read once
    tuned.table.cache_clear()
    assert tuned.lookup(CPU, *SIZES) == (64, 128, 64, 4, 3)
    assert tuned.lookup(CPU, "subnet_grad", BF16, 512, 256, 16) is None
    assert tuned.lookup(CPU, "subnet_grad", torch.float16, 512, 256, 8) is None
    with tuned.forced("subnet_grad", (16, 16, 16, 4, 1)), tuned.asked("subnet_grad") as asked:
        assert tuned.lookup(CPU, *SIZES) == (16, 16, 16, 4, 1)
    assert asked == {SIZES}
    with tuned.forced("subnet_grad", None):  # the rule's, whatever the table has
        assert tuned.lookup(CPU, *SIZES) is None


def test_a_users_table_goes_before_one_of_the_devices_family(cache):
    family = {"format": tuned.FORMAT, "capability": "0.0"}
    other = ROW | {"n_in": 64}
    tuned.write(cache / "tiles-sm_00.json", family, [ROW, other])
    tuned.write(tuned.path(CPU), tuned.header(CPU), [ROW | {"tiles": [32, 32, 32, 4, 2]}])
    assert tuned.lookup(CPU, *SIZES) == (32, 32, 32, 4, 2)
    assert tuned.lookup(CPU, "subnet_grad", BF16, 512, 64, 8) == (64, 128, 64, 4, 3)


def test_a_users_table_is_its_familys_under_another_name(cache):
    gpu = tuned.header(CPU) | {"device": "Other GPU", "triton": "0.1"}
    tuned.write(cache / "tiles-sm_00.json", gpu, [ROW])
    assert tuned.lookup(CPU, *SIZES) == (64, 128, 64, 4, 3)


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "no header": '{"rows": []}',
    "another device": json.dumps(tuned.header(CPU) | {"device": "Other GPU", "rows": [ROW]}),
    "another Triton": json.dumps(tuned.header(CPU) | {"triton": "0.1", "rows": [ROW]}),
    "an older format": json.dumps(tuned.header(CPU) | {"format": 0, "rows": [ROW]}),
}
for name, change in {
    "no power of two": {"tiles": [64, 100, 64, 4, 3]},
    "too few": {"tiles": [64, 128, 64]},
    "text": {"tiles": "64128"},
    "no warps": {"tiles": [64, 128, 64, 0, 3]},
    "no such dtype": {"dtype": "bfloat17"},
    "no such operation": {"op": "matmul"},
}.items():
    BROKEN[name] = json.dumps(tuned.header(CPU) | {"rows": [ROW, ROW | change]})


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_is_no_table_of_this_device_is_left_out_with_one_warning(broken):
    tuned.path(CPU).parent.mkdir(parents=True)
    tuned.path(CPU).write_text(BROKEN[broken])
    with pytest.warns(RuntimeWarning, match=re.escape(f"{tuned.path(CPU)} is not used")):
        assert tuned.lookup(CPU, *SIZES) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.lookup(CPU, *SIZES) is None
    assert tune._before(tuned.path(CPU), tuned.header(CPU)) == []


def test_a_table_is_replaced_whole(cache):
    file = cache / "new" / "table.json"
    tuned.write(file, tuned.header(CPU), [ROW])
    tuned.write(file, tuned.header(CPU), [ROW, ROW | {"run": 16}])
    assert [row["run"] for row in tuned.read(file, tuned.header(CPU))] == [8, 16]
    assert [p.name for p in file.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("into", [256, 4096, 11008])
def test_what_the_default_launches_is_measured(into):
    args, config = argparse.Namespace(neuron_groups=[1, 8, 16], rank_factor=1 / 8), LosiaConfig()
    gathers = {(s.n_in(into), s.group) for s in tune._selections("gather_columns", args, into)}
    assert (config.n_in(into), config.group(into)) in gathers
    products = tune._selections("subnet_grad", args, into)
    assert config.n_in(into) in {s.n_in(into) for s in products if s.n_out(4096) == 4096}


def test_a_launch_shape_is_kept_that_gains_more_than_the_noise_and_nowhere_loses():
    def times(*rule_a_b):
        return [dict(zip(("rule", "a", "b"), row, strict=True)) for row in rule_a_b]

    assert tune.best(times((10, 9, 9.5))) == "a"
    assert tune.best(times((10, 9.8, 9.75))) == "rule"  # 2.5 % may be noise
    assert tune.best(times((10, 5, 9.5), (10, 10.1, 9.5))) == "b"  # a is slower once
    assert tune.best([*times((10, 5, 9.5)), {"rule": 10, "b": 9}]) == "b"  # a cannot run there


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Triton compiles for CUDA devices, not for cpu"),
        (["--models", "no-such"], "--models no-such"),
        (["--ops", "write_back_"], "--ops write_back_"),
        (["--rank-factor", "2"], "--rank-factor 2"),
    ],
)
def test_what_cannot_be_tuned_is_refused(flags, said, capsys):
    assert main(["tune", "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_shape_is_given_as_a_weights(capsys):
    assert tune._shape("4096x11008") == (11008, 4096)
    with pytest.raises(SystemExit):
        main(["tune", "--shape", "4096"])
    assert "4096x11008" in capsys.readouterr().err


def test_doctor_says_which_table_is_used(monkeypatch, capsys):
    gpu = types.SimpleNamespace(name="Test GPU", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cuda = torch.device("cuda:0")
    assert re.fullmatch(r"tiles-test-gpu-9\.0-triton-\d+\.\d+\.\d+\.json", tuned.path(cuda).name)
    for rows, said in (([], "none measured"), ([ROW], "1 measured")):
        if rows:
            tuned.write(tuned.path(cuda), tuned.header(cuda), rows)
        tuned.table.cache_clear()
        main(["doctor"])
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("Launch shapes"))
        assert said in line and str(tuned.path(cuda)) in line
    tuned.path(cuda).write_text("{")
    tuned.table.cache_clear()
    main(["doctor"])
    assert "is not used" in capsys.readouterr().out
