"""The command line's parts: scores, memory, precision, signals, the output folder."""

from __future__ import annotations

import io
import json
import mmap
import os
from pathlib import Path

import pytest
import torch
from cli_tools import PAIRS, make_model, make_tokenizer
from rich.console import Console

from losia_pro.cli import job, memory
from losia_pro.cli.batches import Collate
from losia_pro.cli.data import Data, Record
from losia_pro.cli.encode import IGNORE, encode
from losia_pro.cli.errors import CliError
from losia_pro.cli.heldout import evaluate
from losia_pro.cli.interrupt import interruptible
from losia_pro.cli.rundir import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory):
    """A model that knows some of the answers and not others."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path_factory.mktemp("m")), dtype=torch.float32
    )
    tokenizer = make_tokenizer()
    records = [Record(str(i), (p["prompt"], p["response"])) for i, p in enumerate(PAIRS)]
    samples = encode(Data("pairs", records, records[:1], 0.1, ""), tokenizer, 64).train
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    collate = Collate(tokenizer.pad_token_id)
    for step in range(240):
        batch = collate(samples[8 * (step % 3) :][:8])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer, samples, collate


# --- scores ----------------------------------------------------------------------------------------


def test_exact_match_is_what_greedy_decoding_gives(trained_model):
    model, tokenizer, samples, collate = trained_model
    right = 0
    for pair, sample in zip(PAIRS, samples, strict=True):
        prompt = tokenizer(pair["prompt"], return_tensors="pt")
        n = sum(label != IGNORE for label in sample.labels)
        out = model.generate(**prompt, max_new_tokens=n, do_sample=False)
        right += out[0, prompt.input_ids.shape[1] :].tolist() == sample.labels[-n:]
    score = evaluate(model, samples, collate, 7)
    assert score.exact == right / len(samples)
    assert 0.05 < score.exact < 0.95  # else the test says nothing


def test_held_out_loss_weighs_every_trained_token_the_same(trained_model):
    model, _, samples, collate = trained_model
    total = count = 0
    with torch.no_grad():
        for sample in samples:
            batch = collate([sample])
            n = sum(label != IGNORE for label in sample.labels)
            total, count = total + model(**batch).loss.item() * n, count + n
    scores = [evaluate(model, samples, collate, size).loss for size in (1, 5, 64)]
    assert scores == pytest.approx([total / count] * 3, rel=1e-5)


def test_examples_that_were_cut_do_not_count_as_matches_or_misses(trained_model):
    model, _, samples, collate = trained_model
    known = [s for s in samples if evaluate(model, [s], collate, 1).exact == 1]
    cut = [s._replace(whole=False) for s in samples]
    assert evaluate(model, [*known[:3], *cut], collate, 8).exact == 1.0
    assert evaluate(model, cut, collate, 8).exact is None


def test_evaluation_leaves_mode_and_token_count_alone(trained_model):
    model, _, samples, collate = trained_model
    model.train()
    before = collate.tokens
    evaluate(model, samples[:4], collate, 2)
    assert model.training and collate.tokens == before and model.model.training
    assert not model.eval().training


# --- memory and precision --------------------------------------------------------------------------


def test_full_fine_tuning_needs_sixteen_bytes_a_parameter_and_others_the_weights():
    assert memory.needed_bytes(10, torch.bfloat16, "full") == 160
    assert memory.needed_bytes(10, torch.bfloat16, "losia-pro") == 20
    assert memory.needed_bytes(10, torch.float32, "lora") == 40


def test_free_memory_respects_the_containers_limit(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 99 kB", "MemAvailable: 8000 kB"],
        "/sys/fs/cgroup/memory.max": ["5000000"],
        "/sys/fs/cgroup/memory.current": ["4000000"],
        "/sys/fs/cgroup/memory.stat": ["inactive_file 1500000", "active_file 500000"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 3_000_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert memory.free_bytes(cpu) == 8000 * 1024
    files.clear()
    assert memory.free_bytes(cpu) is None
    memory.check_fits(10**15, torch.float32, "full", cpu)  # unknown: no reason to refuse


def test_the_real_machine_has_free_memory():
    assert 1e6 < (memory.free_bytes(torch.device("cpu")) or 1e9) < 1e14


def test_peak_memory_sees_an_allocation_and_starts_anew():
    peak = memory.Peak(torch.device("cpu"))
    before = peak.read()
    block = mmap.mmap(
        -1, 160_000_000
    )  # not from memory that earlier tests have left to the allocator
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert peak.read() - before > 100e6
    block.close()
    if memory._lines("/proc/self/status"):
        assert memory.Peak(torch.device("cpu")).read() < peak.read() + 1e6


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0.00 MB"), (5e6, "5.00 MB"), (812e6, "812 MB"), (1.25e9, "1.25 GB"), (62.5e9, "62.5 GB")],
)
def test_bytes_are_said_with_three_digits(n, text):
    assert memory.say_bytes(n) == text


def test_precision_is_bf16_only_where_the_hardware_has_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert job.choose_precision("auto", cpu) == "fp32"
    assert job.choose_precision("bf16", cpu) == "bf16"
    for capability, precision in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert job.choose_precision("auto", gpu) == precision
    assert job.choose_precision("fp16", gpu) == "fp16"


# --- signals ---------------------------------------------------------------------------------------


def test_signals_are_left_alone_outside_the_main_thread():
    import signal
    import threading

    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with interruptible(Console(file=io.StringIO())) as interrupt:
            seen.append((signal.getsignal(signal.SIGINT), interrupt.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


# --- the output folder -----------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})
    folder.save()
    with pytest.raises(ZeroDivisionError), folder.writing("run.json") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}
    for content in ("first", "second"):
        with folder.writing("merged") as path:
            path.mkdir()
            (path / "x").write_text(content)
    assert (tmp_path / "merged" / "x").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run.json"]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path, {})
    assert folder.last_checkpoint("lora") is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"glo')):
        path = folder.checkpoints("lora") / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text(state)
    (folder.checkpoints("lora") / "checkpoint-12").mkdir()
    assert folder.last_checkpoint("lora") == folder.checkpoints("lora") / "checkpoint-10"
    folder.checkpoints("full").mkdir()
    folder.drop_checkpoints("lora")
    assert folder.last_checkpoint("lora") is None and folder.checkpoints("full").exists()


def test_what_is_written_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        folder = RunFolder(tmp_path, {})
        for name in ("delta.safetensors", "merged/model.safetensors"):
            with folder.writing(name.split("/")[0]) as path:
                file = path.parent / name
                file.parent.mkdir(exist_ok=True)
                file.touch(0o600)  # as safetensors does
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize("output", [None, "a/b"])
def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(CliError, match=f"cannot be written, because {tmp_path} cannot"):
        RunFolder.choose(output, "name", False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "complete"}'])
def test_only_an_interrupted_run_can_be_resumed(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CliError, match="there is no run|that run is complete"):
        RunFolder.open(tmp_path)


def test_the_module_is_the_command_line(monkeypatch, capsys):
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["losia_pro", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("losia_pro", run_name="__main__")
    assert exit_.value.code == 0 and "losia-pro" in capsys.readouterr().out
