"""What the command line refuses: one red sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from cli_tools import finetune, make_tokenizer, write_lines

from losia_pro.cli import job as jobs
from losia_pro.cli import main, memory, options
from losia_pro.cli.progress import TrainingProgress


def refused(capsys, *flags) -> str:
    """The sentence."""
    assert finetune(*flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


def bad_flag(capsys, *flags) -> str:
    """argparse's own sentence."""
    with pytest.raises(SystemExit) as exit_:
        finetune(*flags)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-length", 65), "the model reads 64 tokens at most"),
        (("--device", "cuda"), "no CUDA GPU is visible"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--impl", "cuda"), "--impl cuda: .* cannot run on cpu.*use --impl torch"),
        (("--rank-factor", 1.5), r"rank_factor must be in \(0, 1\] or None, got 1.5"),
        (("--rank-factor", 0.001), "is too small to slice"),
        (("--target-modules", "q_proj,nope"), "'nope' matches no module"),
        (("--method", "lora", "--target-modules", "nope"), "'nope' matches no module"),
        (("--target-modules", "(q_proj"), r"'\(q_proj' is not a regular expression"),
        (("--steps", 3, "--epochs", 1), "--steps or --epochs, not both"),
        (("--eval-split", "nope"), "data: split 'nope' cannot be read"),
        (("--epochs", 1e12), r"--epochs 1e\+12: of 60 examples each, .* 1,666,666 would do"),
        (("--epochs", 1e308), r"--epochs 1e\+308: of 60 examples each"),
        (("--steps", 10**12, "--accumulation", 2), "--steps 1000000000000: of 16 examples each"),
        (("--resume",), "give --resume DIR"),
        (("--resume", "no/such"), "there is no run in that folder"),
        (("--resume", "~nobody-of-that-name/run"), "there is no run in that folder"),
        (("--model", "~nobody-of-that-name/model"), "no such folder"),
        (("--data", "~nobody-of-that-name/data.jsonl"), "no such file"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_written(
    base, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available() and "cuda" in flags + ("fp16" in flags) * ("cuda",):
        pytest.skip("there is a GPU")
    assert re.search(message, refused(capsys, *base, *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", 0), "must be 1 or more, got 0"),
        (("--epochs", -1), "must be above 0"),
        (("--warmup", -1), "must be 0 or more"),
        (("--lr", "lora:1"), "'lora:1' is neither a rate nor METHOD=RATE"),
        (("--lr", "dora=1e-3"), "'dora' is none of losia-pro, losia, lora, full"),
        (("--lr", "0"), "above 0"),
        (("--compare", "lora,dora"), "'dora' is none of"),
        (("--period", "-3"), "must be 1 or more"),
        (("--period", "often"), "must be a whole number of 1 or more, got 'often'"),
        (("--steps", "1e3"), "must be a whole number of 1 or more, got '1e3'"),
        (("--warmup", "some"), "must be a number, got 'some'"),
        (("--clip", "inf"), "must be above 0 and finite, got inf"),
        (("--lr", ","), "needs a rate, e.g. 1e-3, got ','"),
        (("--seed", "-1"), "must be in [0, 2**32), got -1"),
        (("--seed", 2**32), "must be in [0, 2**32), got 4294967296"),
    ],
)
def test_a_bad_value_is_named(capsys, flags, message):
    # Of a run that is not there: what is not refused trains nothing.
    assert message in bad_flag(capsys, "--resume", "no/such", *flags)


def test_model_and_data_come_together(base, capsys):
    assert "--model needs --data too" in refused(capsys, *base[:2])
    assert "--data needs --model too" in refused(capsys, *base[2:])


def test_a_recipe_without_data_asks_for_data(base, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 2\n")
    message = refused(capsys, "--recipe", recipe, *base[:2])
    assert "mine.yaml needs --data too" in message


@pytest.mark.parametrize("lost", [["base_decay"], ["prompt", "tasks"]], ids=str)
def test_a_run_of_a_version_that_had_fewer_settings_is_not_resumed(base, tmp_path, capsys, lost):
    given = {"model": str(base[1]), "data": str(base[3])}
    arguments = {k: v for k, v in vars(options.resolve(given)).items() if k not in lost}
    before = json.dumps({"status": "running", "arguments": arguments})
    (tmp_path / "run.json").write_text(before)
    message = refused(capsys, "--resume", tmp_path)
    assert f"lack {', '.join(lost)}, which" in message
    assert "afresh" in message and "the version that began it" in message
    assert (tmp_path / "run.json").read_text() == before
    assert message == refused(capsys, "--resume", tmp_path, "--base-decay", 0.5)


def test_without_a_checkout_the_example_says_what_would_do(tmp_path, capsys, monkeypatch):
    import losia_pro

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(losia_pro, "__file__", str(tmp_path / "a" / "b" / "__init__.py"))
    assert "run inside a checkout, or give --model and --data" in refused(capsys)


def test_the_data_is_read_before_the_model(base, tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "d.jsonl", ['{"text": "a"}', "oops"])
    monkeypatch.setattr(jobs, "make_job", lambda *_: pytest.fail("the model was touched"))
    assert f"{path}:2: not a JSON object" in refused(
        capsys, "--model", "no/model", "--data", path
    ).replace("\n", "")


def test_a_model_that_cannot_be_read_is_named(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "a file; a model is a folder" in refused(
        capsys, "--model", tmp_path / "file", *base[2:], "--output", tmp_path / "r"
    )
    for model in (tmp_path / "empty", tmp_path / "no-such", "./no-such", "~/no-such"):
        assert f"--model {model}" in refused(
            capsys, "--model", model, *base[2:], "--output", tmp_path / "r"
        )
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text(json.dumps({"model_type": "vit"}))
    make_tokenizer().save_pretrained(vision)
    assert f"--model {vision}" in refused(
        capsys, "--model", vision, *base[2:], "--output", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()


def test_an_output_folder_that_is_taken_is_refused(base, tmp_path, capsys):
    flags = (*base, "--steps", 1, "--batch-size", 2, "--method", "full")
    run, other, file = tmp_path / "run", tmp_path / "other", tmp_path / "file"
    assert finetune(*flags, "--output", run) == 0
    before = (run / "run.json").read_text()
    message = refused(capsys, *flags, "--output", run)
    assert f"holds another run; continue it with --resume {run}" in message
    assert (run / "run.json").read_text() == before
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    for overwrite in ((), ("--overwrite",)):
        assert "holds other files" in refused(capsys, *flags, "--output", other, *overwrite)
    assert (other / "thesis.txt").read_text() == "precious"
    file.write_text("precious")
    assert "a file of that name" in refused(capsys, *flags, "--output", file)
    assert "cannot be written" in refused(capsys, *flags, "--output", file / "under")
    assert finetune(*flags, "--seed", 5, "--output", run, "--overwrite") == 0
    assert json.loads((run / "run.json").read_text())["arguments"]["seed"] == 5


def test_an_overwriting_run_that_is_refused_leaves_the_old_one(base, tmp_path, capsys):
    flags = (*base, "--steps", 1, "--batch-size", 2, "--output", tmp_path / "run")
    assert finetune(*flags) == 0
    before = {p.name for p in (tmp_path / "run").iterdir()}
    refused(capsys, *flags, "--overwrite", "--rank-factor", 0.001)
    assert {p.name for p in (tmp_path / "run").iterdir()} == before


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400_000)
    flags = (*base, "--output", tmp_path / "run")
    message = refused(capsys, *flags)
    assert "need at least 0.0 GB" in message and "--precision bf16 halves the weights" in message
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    message = refused(capsys, *flags, "--compare", "full")
    assert message.startswith("error: full: ") and "--method losia-pro" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_says_what_would_do(base, tmp_path, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(jobs.Job, "evaluate", fail)
    message = refused(capsys, *base, "--output", tmp_path / "run")
    assert "out of memory" in message
    assert all(flag in message for flag in ("--batch-size", "--checkpointing", "--precision"))


def test_training_that_diverges_stops_and_names_the_rate(base, tmp_path, capsys, monkeypatch):
    run, shown = tmp_path / "run", []
    monkeypatch.setattr(TrainingProgress, "step", lambda self, step, loss, *_: shown.append(loss))
    flags = (*base, "--steps", 20, "--batch-size", 4, "--warmup", 1, "--compare", "full")
    assert finetune(*flags, "--lr", "1e-3,full=1e30", "--output", run) == 2
    out, err = capsys.readouterr()
    assert (
        "full: the held-out loss is nan: training has diverged; lower --lr, which is 1e+30" in err
    )
    assert 0 not in shown and "full         20/20" not in out
    before = json.loads((run / "run.json").read_text(), parse_constant=pytest.fail)
    assert before["results"].keys() == {"losia-pro"}


def test_a_base_model_without_a_finite_loss_is_refused(base, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base[1])
    model.model.norm.weight.data[0] = float("nan")
    for part in (model, AutoTokenizer.from_pretrained(base[1])):
        part.save_pretrained(tmp_path / "broken")
    flags = ("--model", tmp_path / "broken", *base[2:], "--output", tmp_path / "run")
    assert finetune(*flags) == 2
    assert "its held-out loss is nan before training, in fp32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_errors_keep_their_traceback(base, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(jobs.Job, "evaluate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        finetune(*base, "--output", tmp_path / "run")


def test_a_missing_package_is_named(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = (*base, "--output", tmp_path / "run")
    assert refused(capsys, *flags).endswith("pip install matplotlib\n")
    assert "pip install matplotlib peft" in refused(capsys, *flags, "--compare", "lora")
    assert not (tmp_path / "run").exists()
    monkeypatch.delitem(sys.modules, "matplotlib")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, "--model", "m", "--data", "someone/thing")


def test_help_needs_neither_transformers_nor_a_model():
    script = (
        "import sys\nfrom losia_pro.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'transformers', 'datasets', 'peft', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--rank-factor" in done.stdout and "doctor" in done.stdout


def test_no_command_is_refused_and_the_version_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0 and re.search(r"losia-pro \d", capsys.readouterr().out)
