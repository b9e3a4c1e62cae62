"""losia-pro evaluate scores a model as lm-evaluation-harness does, and the figure is the one counted by hand."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from cli_tools import PAIRS, WORDS, make_model, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.cli import main

pytest.importorskip("lm_eval")

DOCS = [
    {"q": p["prompt"], "options": WORDS[:4], "gold": WORDS[:4].index(p["response"].split()[1][:-1])}
    for p in PAIRS
    if p["response"].split()[1][:-1] in WORDS[:4]
]
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ q }}}}"
doc_to_choice: options
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
CODE = TASK.replace("task: words", "task: code\nunsafe_code: true")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "model", torch.float32)


@pytest.fixture(scope="module")
def delta(base, tmp_path_factory):
    """Of a model that has been tuned, so that it chooses other options."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, base_decay=0))
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    for _ in range(2):
        for doc in DOCS:
            text = f"{doc['q']} {doc['options'][doc['gold']]}"
            ids = tokenizer(text, return_tensors="pt").input_ids
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    losia.save_delta(path)
    return path


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks over a JSONL file; those that come with the package are not searched: 8 s."""
    import lm_eval.tasks

    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    path = write_lines(folder / "docs.jsonl", DOCS)
    (folder / "words.yaml").write_text(TASK.format(path=path))
    (folder / "code.yaml").write_text(CODE.format(path=path))
    return folder


@torch.no_grad()
def by_hand(folder, delta=None, docs=DOCS) -> float:
    """The share of documents whose right option is the most likely one, each scored alone."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    if delta:
        losia_pro.load_delta(model, delta)
    right = 0
    for doc in docs:
        head = tokenizer(doc["q"]).input_ids
        scores = []
        for option in doc["options"]:
            tail = tokenizer(f" {option}").input_ids
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(tail)))
        right += scores.index(max(scores)) == doc["gold"]
    return right / len(docs)


def evaluate(*args) -> int:
    return main(["evaluate", *map(str, args)])


def figures(path) -> dict:
    return json.loads(path.read_text())


def test_the_figure_is_the_one_counted_by_hand_of_a_base_and_of_a_delta(
    base, delta, tasks, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before, after = by_hand(base), by_hand(base, delta)
    assert (
        before != after and 0 < min(before, after) < max(before, after) < 1
    )  # else they tell little
    common = (base, "--tasks", "words", "--include", tasks, "--device", "cpu")
    assert evaluate(*common, "--output", "base.json") == 0
    assert evaluate(*common, "--delta", delta) == 0
    out = capsys.readouterr().out
    assert "words" in out and f"|{after:.4g}" in out and "evaluation.json" in out
    for name, share in (("base.json", before), ("evaluation.json", after)):
        r = figures(tmp_path / name)
        assert r["figures"]["results"]["words"]["acc,none"] == pytest.approx(share, abs=1e-12)
        assert r["figures"]["n-samples"]["words"]["effective"] == len(DOCS)
    assert r["arguments"]["delta"] == str(delta) and r["dtype"] == "float32"
    assert "lm-eval" in r["versions"] and r["device"]["type"] == "cpu"


def test_the_merged_model_scores_as_its_base_and_delta(base, delta, tasks, tmp_path):
    merged = tmp_path / "merged"
    assert main(["merge", str(base), str(delta), str(merged)]) == 0
    assert (
        evaluate(merged, "--tasks", "words", "--include", tasks, "--limit", 9, "--batch-size", 2)
        == 0
    )
    r = figures(merged / "evaluation.json")["figures"]  # beside the model, unless told otherwise
    assert r["results"]["words"]["acc,none"] == pytest.approx(
        by_hand(base, delta, DOCS[:9]), abs=1e-12
    )
    assert r["n-samples"]["words"]["effective"] == 9


def test_flags_reach_the_harness(base, tasks, tmp_path, monkeypatch):
    import lm_eval

    seen = {}

    def stop(**arguments):
        seen.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(lm_eval, "simple_evaluate", stop)
    flags = (
        "--shots",
        3,
        "--limit",
        5,
        "--chat",
        "--run-code",
        "--batch-size",
        7,
        "--max-length",
        32,
    )
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    assert evaluate(base, "--tasks", "words,code", "--include", tasks, *flags) == 2
    assert seen["tasks"] == ["words", "code"] and seen["num_fewshot"] == 3 and seen["limit"] == 5
    assert seen["apply_chat_template"] is seen["confirm_run_unsafe_code"] is True
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"  # the metric of humaneval asks for it
    assert seen["model"].batch_size == 7 and seen["model"].max_length == 32


def refused(capsys, *args) -> str:
    assert evaluate(*args) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    return err.splitlines()[-1]


def test_what_cannot_be_evaluated_is_refused(base, delta, tasks, tmp_path, capsys):
    common = ("--include", tasks, "--output", tmp_path / "e.json")
    assert "no such task (words)" in refused(capsys, base, "--tasks", "word", *common)
    assert "no such folder" in refused(
        capsys, base, "--tasks", "words", "--include", tmp_path / "no"
    )
    assert "MODEL" in refused(capsys, tmp_path / "no", "--tasks", "words", *common)
    assert "--shots -1" in refused(capsys, base, "--tasks", "words", "--shots", "-1", *common)
    assert "give --run-code" in refused(capsys, base, "--tasks", "code", *common)
    assert "(MODEL is" in refused(capsys, base, "--tasks", "words", "--delta", tasks, *common)
    assert "--output" in refused(
        capsys, base, "--tasks", "words", "--output", tmp_path / "no" / "e.json"
    )
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((base / name).read_bytes())
    assert "no tokenizer" in refused(capsys, tmp_path / "bare", "--tasks", "words", *common)
    assert not (tmp_path / "e.json").exists()


def test_the_figures_are_json_without_nan_or_a_sentence(base, tasks, tmp_path, monkeypatch, capsys):
    import lm_eval

    def without_number(**settings):
        found = original(**settings)
        found["results"]["words"]["acc_stderr,none"] = float("nan")
        return found

    original = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", without_number)
    flags = (base, "--tasks", "words", "--include", tasks, "--limit", 2, "--device", "cpu")
    assert evaluate(*flags, "--output", tmp_path / "e.json") == 0
    found = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)
    assert found["figures"]["results"]["words"]["acc_stderr,none"] is None
    assert "--output /proc/e.json: cannot be" in refused(capsys, *flags, "--output", "/proc/e.json")


def test_a_file_that_cannot_be_written_is_refused_first_and_on_a_full_disk_the_table_is_not_lost(
    base, delta, tasks, tmp_path, monkeypatch, capsys
):
    flags = ("--tasks", "words", "--include", tasks, "--limit", 2, "--device", "cpu")
    assert evaluate(base, *flags, "--delta", delta, "--output", "/dev/full") == 2
    out, err = capsys.readouterr()
    assert "|words|" in out and "--output /dev/full: cannot be written (No space" in err

    access, here = os.access, Path()  # as for a user other than root
    monkeypatch.setattr(os, "access", lambda path, mode: path != here and access(path, mode))
    monkeypatch.setattr("losia_pro.cli.evaluate._load", pytest.fail)
    said = refused(capsys, base, *flags, "--delta", delta)
    assert "--output evaluation.json: cannot be written" in said


def test_without_the_harness_it_says_how_to_get_it(base, monkeypatch, capsys):
    from losia_pro.cli import evaluate as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lm-eval[hf]'" in refused(capsys, base, "--tasks", "gsm8k")
