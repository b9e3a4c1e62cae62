"""losia-pro merge makes the tuned model's folder, whole; losia-pro inspect tells what a delta holds."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import toys
from cli_tools import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.cli import inspect, main, merge
from losia_pro.entries import encode


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A delta's file and the model that it was saved from, in bf16 as the base is stored."""
    return tune(base, tmp_path_factory.mktemp("tuned") / "d", torch.bfloat16)


def tune(base, path, dtype):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    losia = losia_pro.attach(
        model, LosiaConfig(rank_factor=1 / 8, period=2, output_factor=1 / 4, train_bias=True)
    )
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losia.save_delta(path)
    return path, losia.detach()


def refused(capsys, *args) -> str:
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_the_merged_model_is_the_detached_one_bit_for_bit(base, tuned, there, tmp_path):
    path, model = tuned
    out = tmp_path / "out"
    if there:
        out.mkdir()
    assert main(["merge", str(base), str(path), str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    toys.equal_bits(merged.state_dict(), model.state_dict())
    assert merged.dtype == torch.bfloat16
    tokenizers = [AutoTokenizer.from_pretrained(f)("say red").input_ids for f in (base, out)]
    assert tokenizers[0] == tokenizers[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_merge_makes_can_be_read_by_whom_the_umask_allows(base, tuned, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(["merge", str(base), str(tuned[0]), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}


def test_a_delta_of_another_dtype_says_which_one(base, tmp_path, capsys):
    path, model = tune(base, tmp_path / "d", torch.float32)
    message = refused(capsys, "merge", base, path, tmp_path / "out")
    assert "in float32, which this one is not in" in message and message.count("float32") == 1
    assert f"(BASE is {base}; --dtype says in what it is loaded)" in message
    assert not (tmp_path / "out").exists()
    assert main(["merge", str(base), str(path), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    toys.equal_bits(merged.state_dict(), model.state_dict())


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(base, tuned, tmp_path, capsys):
    path, model = tuned
    model.save_pretrained(tmp_path / "another")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-3])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    for flags, message in (
        ((tmp_path / "another", path, tmp_path / "out"), "made from other weights"),
        ((base, tmp_path / "cut", tmp_path / "out"), "not a complete safetensors file"),
        ((base, tmp_path / "no", tmp_path / "out"), "no such delta file"),
        ((tmp_path / "full", path, tmp_path / "out"), "no config.json"),
        ((tmp_path / "no", path, tmp_path / "out"), "no such folder"),
        ((base, path, tmp_path / "full"), "the folder holds files"),
        ((base, path, base), "the folder holds files"),
        ((base, path, tmp_path / "cut"), "a file of that name"),
        ((base, path, tmp_path / "no" / "out"), "cannot be written"),
    ):
        assert message in refused(capsys, "merge", *flags)
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("late", [False, True], ids=["while saving", "the name is taken"])
def test_a_merge_that_fails_leaves_no_half_of_a_folder(
    base, tuned, late, tmp_path, capsys, monkeypatch
):
    to_disk = merge.delta.to_disk

    def fail(path):
        if not late:
            raise OSError(28, "No space left on device")
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()
        to_disk(path)

    monkeypatch.setattr(merge.delta, "to_disk", fail)
    assert "cannot be written" in refused(capsys, "merge", base, tuned[0], tmp_path / "out")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == (
        ["out", "out/theirs"] if late else []
    )


def test_inspect_counts_each_entry_once(tmp_path, capsys):
    model = toys.stack(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = LosiaConfig(rank_factor=1 / 4, period=2, train_bias=True, schedule="sync")
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.5)
    losia.bind(optimizer)
    data = [(x.bfloat16(), y) for x, y in toys.batches(7)]
    list(toys.train(model, optimizer, data))
    losia.save_delta(tmp_path / "d")
    assert main(["inspect", str(tmp_path / "d"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == "2" and facts["base"] == losia.base_digest
    assert LosiaConfig(**facts["config"]) == config
    assert facts["bytes"] == (tmp_path / "d").stat().st_size
    tensors = losia_pro.delta.read(tmp_path / "d")[1]
    visited = {}
    for n, m in losia.modules.items():
        mask = torch.zeros(m.weight.shape, dtype=torch.bool)
        for rows, columns in losia.touched(n):
            mask[rows[:, None], columns] = True
        assert not (m.weight != before[f"{n}.weight"])[~mask].any()
        visited[n], told = int(mask.sum()), facts["modules"][n]
        assert (told["entries"], told["shape"]) == (visited[n], list(mask.shape))
        assert told["share"] == visited[n] / mask.numel() and told["dtype"] == "bfloat16"
        assert told["bytes"] == sum(t.nbytes for k, t in tensors.items() if k.startswith(n + "."))
        assert told["bias"] == (m.bias is not None)
    assert facts["entries"] == sum(visited.values())
    assert facts["share"] == facts["entries"] / sum(
        m.weight.numel() for m in losia.modules.values()
    )
    assert main(["inspect", str(tmp_path / "d")]) == 0
    text = capsys.readouterr().out
    assert all(n in text for n in losia.modules) and losia.base_digest in text


@pytest.mark.parametrize("form", ["blocks", "bitmap"])
def test_inspect_says_in_what_runs_inputs_were_chosen_from_the_inputs(
    form, tmp_path, capsys, monkeypatch
):
    """The default has runs of 16 of 512 inputs and single ones of 100; all of the head's; and what was loaded before
    is of another configuration."""
    monkeypatch.setattr(losia_pro.delta, "encode", lambda *args: encode(*args[:2], form))

    def inspected(config, loaded=None):
        losia = losia_pro.attach(toys.stack(width=512, hidden=100), config)
        if loaded:
            losia_pro.load_delta(losia.model, loaded)
        losia.save_delta(tmp_path / "d")
        modules = inspect.examine(str(tmp_path / "d"))["modules"]
        return {name.split(".")[-1]: m["input_runs"] for name, m in modules.items()}

    assert inspected(LosiaConfig(neuron_group=4)) == {"up": 4, "down": 4}
    assert inspected(LosiaConfig(neuron_group=1)) == {"up": 1, "down": 1}
    assert inspected(LosiaConfig(), tmp_path / "d") == {"up": 1, "down": 1}
    assert inspected(LosiaConfig(output_factor=0.5)) == {"up": 16, "down": 1, "head": None}
    assert main(["inspect", str(tmp_path / "d")]) == 0
    said = re.findall(r"layers\.\d\.(\w+) .* of (\d+) ", capsys.readouterr().out)
    assert said == [("up", "16"), ("down", "1")] * 3


def test_inspect_refuses_what_load_delta_refuses(tuned, tmp_path, capsys):
    path, _ = tuned
    header, tensors = losia_pro.delta.read(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-3])
    assert "not a complete safetensors file" in refused(capsys, "inspect", tmp_path / "cut")
    assert "no such delta file" in refused(capsys, "inspect", tmp_path / "no")
    name = next(iter(json.loads(header["modules"])))
    for edit, message in (
        ({"shapes": "{}"}, "shapes of the weights"),
        ({"shapes": json.dumps({**json.loads(header["shapes"]), name: [2, 2]})}, "malformed delta"),
        ({"modules": "[]"}, "does not list modules"),
        ({"config": "[1]"}, "config is no object"),
    ):
        safetensors.torch.save_file(tensors, tmp_path / "d", {**header, **edit})
        assert message in refused(capsys, "inspect", tmp_path / "d")
    for config in ('{"neuron_group": "x"}', '{"neuron_group": 0}', "{}", "null"):  # what is printed
        safetensors.torch.save_file(tensors, tmp_path / "d", {**header, "config": config})
        assert main(["inspect", str(tmp_path / "d")]) == 0


def test_inspect_needs_the_core_alone(tuned):
    script = (
        "import sys\n"
        "from losia_pro.cli import main\n"
        f"assert main(['inspect', {str(tuned[0])!r}]) == 0\n"
        "assert not {'transformers', 'rich', 'numpy.testing', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        inspect.examine(str(tuned[0]))["modules"].keys()
        == json.loads(losia_pro.delta.read(tuned[0])[0]["modules"]).keys()
    )
