"""losia-pro doctor says what runs here, and why the rest does not."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

from losia_pro import dispatch
from losia_pro.cli import doctor, main


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", None)


@pytest.fixture
def fresh_modules():
    dispatch._module.cache_clear()
    dispatch._chosen.cache_clear()
    yield
    dispatch._module.cache_clear()
    dispatch._chosen.cache_clear()


@pytest.fixture
def one_gpu(monkeypatch):
    gpu = types.SimpleNamespace(name="Test GPU", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)


@pytest.fixture
def compiled(monkeypatch, fresh_modules):
    """A stand-in for the compiled module, for its description."""
    module = types.ModuleType("losia_pro._cuda")
    module.__file__ = "/somewhere/_cuda.so"
    module.ARCHS, module.TOOLKIT = "80-real,90", 12080
    monkeypatch.setitem(sys.modules, "losia_pro._cuda", module)
    monkeypatch.delitem(sys.modules, "losia_pro._cuda_ops", raising=False)
    yield
    sys.modules.pop("losia_pro._cuda_ops", None)


def words(line: str) -> list[str]:
    return line.split()


def test_every_operation_on_the_cpu_uses_torch_and_says_why_not_the_others(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in dispatch.PREFERENCE:
        (line,) = (words(line) for line in lines if line.startswith(op))
        assert line[:3] == [op, "torch", "triton"] and len(line) > 4
    assert any(words(line)[:2] == ["torch", torch.__version__] for line in lines)


def test_json_holds_the_same_facts(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    for op in dispatch.PREFERENCE:
        choice = facts["operations"]["cpu"][op]
        assert choice["uses"] == dispatch.resolve(op, "cpu")
        assert [i["name"] for i in choice["implementations"]] == list(dispatch.IMPLS)
        assert all(i["usable"] or i["reason"] for i in choice["implementations"])


def test_a_gpu_is_described_and_gets_a_table_of_its_own(one_gpu, capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert "the driver supports up to 13.1" in out
    assert ["cuda:0", "Test", "GPU", "9.0", "1.0", "GiB"] in [words(x) for x in out.splitlines()]
    facts = doctor.examine()
    triton = facts["operations"]["cuda:0"]["gather_columns"]["implementations"][1]
    assert triton == {"name": "triton", "usable": True, "reason": ""}


def test_the_compiled_module_is_described(compiled, capsys):
    main(["doctor"])
    assert "Compiled module: _cuda.so, CUDA 12.8, for sm_80, sm_90 + PTX" in capsys.readouterr().out


def test_what_another_implementation_answers_is_said(one_gpu, monkeypatch, capsys):
    """That subnet_grad of many tokens in runs is Triton's, where CUDA's is the one for all else."""
    monkeypatch.setattr(dispatch, "_why_not", lambda op, device, impl: "")
    main(["doctor"])
    lines = [words(line) for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index(["on", "cuda:0", "uses", "not", "because"]) :]
    at = {line[0]: k for k, line in enumerate(table) if line and line[0] in dispatch.PREFERENCE}
    k = at["subnet_grad"]
    assert table[k][1:4] == ["cuda", "torch", "usable,"]
    assert table[k + 1] == "triton used for aligned runs, more than 2048 tokens".split()
    k = at["importance_update_"]
    assert table[k + 1] == "cuda used for weights of at most 1048576 entries".split()
    assert table[at["gather_columns"] + 1] == "triton usable, not preferred".split()
    monkeypatch.setattr(dispatch, "IMPL", "cuda")  # then it answers all
    assert not any(
        "used_for" in i
        for c in doctor.examine()["operations"]["cuda:0"].values()
        for i in c["implementations"]
    )


def test_a_missing_compiled_module_says_how_to_get_it(monkeypatch, fresh_modules, capsys):
    monkeypatch.setitem(sys.modules, "losia_pro._cuda", None)
    monkeypatch.delitem(sys.modules, "losia_pro._cuda_ops", raising=False)
    main(["doctor"])
    assert "Compiled module: not built: reinstall losia-pro with nvcc" in capsys.readouterr().out


def test_a_choice_that_cannot_run_here_is_shown_falling_back(monkeypatch, recwarn, capsys):
    monkeypatch.setattr(dispatch, "IMPL", "triton")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "LOSIA_IMPL=triton" in out
    assert ["gather_columns", "torch", "triton"] in [words(line)[:3] for line in out.splitlines()]
    assert not recwarn.list


def test_a_choice_of_another_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "IMPL", "fast")
    assert main(["doctor"]) == 2
    assert "LOSIA_IMPL: impl must be one of" in capsys.readouterr().err


def test_it_runs_with_the_core_alone():
    blocked = ["rich", "transformers", "peft", "datasets", "matplotlib", "accelerate"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from losia_pro.cli import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
