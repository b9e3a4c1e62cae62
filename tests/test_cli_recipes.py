"""Recipes: every one reads records of its dataset's fields, holds the published settings, and gives way to flags."""

from __future__ import annotations

import json

import pytest
from cli_tools import PAIRS, finetune, make_model, record, write_lines

from losia_pro import LosiaConfig
from losia_pro.cli import data, main, recipes
from losia_pro.cli.errors import CliError

TAGS = "[header] How to boil eggs [title] Take a pot. [step] Fill it"
ARC = {
    "question": "Red?",
    "choices": {"text": ["no", "yes"], "label": ["A", "B"]},
    "answerKey": "B",
}
SCENE = {
    "activity_label": "Food", "ctx_a": TAGS, "ctx_b": "the cook", "endings": ["sits. [substeps] Ok", "goes"],
    "label": "0",
}  # fmt: skip
BLANK = {
    "sentence": "Ann saw Bea as _ was tall .",
    "option1": "Ann",
    "option2": "Bea",
    "answer": "2",
}

# The fields that each dataset has on the hub, and what is made of them.
ROWS = {
    "metamathqa": (
        {"type": "GSM_Rephrased", "query": "1+1?", "original_question": "1+1?", "response": "2\n#### 2"},
        ("Question: 1+1?\nAnswer:", " 2\n#### 2"),
    ),
    "magicoder-evol": (
        {"instruction": "Add.", "response": "a + b\n"},
        ("@@ Instruction\nAdd.\n\n@@ Response\n", "a + b\n"),
    ),
    "magicoder-oss": (
        {"lang": "python", "raw_index": 1, "index": 2, "seed": "x", "openai_fingerprint": "f",
         "problem": "Add.", "solution": "a + b"},
        ("@@ Instruction\nAdd.\n\n@@ Response\n", "a + b"),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "text": "all of it"},
        ("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n", "2"),
    ),
    "arc-challenge": ({"id": "a", **ARC}, ("Question: Red?\nAnswer:", " yes")),
    "hellaswag": (
        {"ind": 1, "ctx": f"{TAGS} the cook", "source_id": "s", "split": "train", "split_type": "i", **SCENE},
        ("Food: How to boil eggs. Take a pot. Fill it The cook", " sits. Ok"),
    ),
    "winogrande": (BLANK, ("Ann saw Bea as Bea", " was tall .")),
    "piqa": (
        {"goal": "Boil eggs", "sol1": "in a pot", "sol2": "in a hat", "label": 0},
        ("Question: Boil eggs\nAnswer:", " in a pot"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


def dataset(folder, row, subset=None, n=4):
    """A folder as the hub has it: Parquet, one or two splits, and the subsets in the card."""
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_list([row] * n)
        rows.to_parquet(str(folder / "files" / f"{split}.parquet"))
    files = [{"split": s, "path": f"files/{s}.parquet"} for s in ("train", "validation")]
    name = subset or "default"
    card = {"configs": [{"config_name": name, "data_files": files}]}
    if subset:
        other = [{"split": "train", "path": "files/validation.parquet"}]
        card["configs"].append({"config_name": "another", "data_files": other})
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


def read(name, source):
    r = recipes.read(name)
    return data.load(
        str(source), None, r.get("split", "train"), r["eval_split"],
        r.get("subset"), r["prompt"], r["response"],
    )  # fmt: skip


def test_every_recipe_is_tested():
    assert set(recipes.names()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_records_of_the_datasets_fields_become_prompt_and_response(name, tmp_path):
    row, expected = ROWS[name]
    subset = recipes.read(name).get("subset")
    found = read(name, dataset(tmp_path, row, subset))
    assert found.kind == "pairs" and {r.content for r in found.train} == {expected}
    assert {r.content for r in found.held_out} == {expected}


@pytest.mark.parametrize(
    ("name", "task"),
    [("metamathqa", "gsm8k/gsm8k.yaml"), ("arc-challenge", "arc/arc_easy.yaml"), ("piqa", "piqa/piqa.yaml")],
)  # fmt: skip
def test_prompts_are_those_of_the_tasks(name, task):
    lm_eval = pytest.importorskip("lm_eval")
    from pathlib import Path

    from lm_eval.utils import apply_template

    text = (Path(lm_eval.__file__).parent / "tasks" / task).read_text()
    theirs = next(line for line in text.splitlines() if line.startswith("doc_to_text: "))
    row, (prompt, _) = ROWS[name]
    row = {**row, "question": row.get("query", row.get("question"))}
    assert prompt == apply_template(json.loads(theirs.removeprefix("doc_to_text: ")), row)


def test_the_harness_has_the_recipes_tasks():
    tasks = pytest.importorskip("lm_eval.tasks")
    known = tasks.TaskManager().all_tasks
    assert {t for name in recipes.names() for t in recipes.read(name)["tasks"]} <= set(known)


def test_prompts_that_tasks_make_by_functions_are_theirs_too():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.winogrande import preprocess_winogrande as winogrande

    row, (prompt, response) = ROWS["hellaswag"]
    assert prompt == preprocess(f"Food: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    assert response == f" {preprocess(row['endings'][0])}"
    row, (prompt, response) = ROWS["winogrande"]
    assert prompt == winogrande.doc_to_choice(row)[winogrande.doc_to_text(row)]
    assert response == f" {winogrande.doc_to_target(row)}"


@pytest.mark.parametrize("name", ROWS)
def test_the_settings_are_the_published_ones(name):
    r = recipes.read(name)
    commonsense = name in ("arc-challenge", "hellaswag", "winogrande", "piqa")
    paper = LosiaConfig.paper("commonsense" if commonsense else "instruction")
    for flag in ("rank_factor", "period", "output_factor"):
        assert r[flag] == getattr(paper, flag), flag
    assert (r["batch_size"], r["max_length"]) == ((16, 256) if commonsense else (4, 2048))
    assert r["lr"] == {"losia-pro": 5e-5, "losia": 5e-5}
    assert (r["warmup"], r["scheduler"]) == (0.1, "cosine")


def test_a_label_that_is_not_public_is_refused_rather_than_guessed(tmp_path):
    for name, label in (
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("piqa", {"label": -1}),
    ):
        source = dataset(
            tmp_path / name, {**ROWS[name][0], **label}, recipes.read(name).get("subset")
        )
        with pytest.raises(CliError, match="--(prompt|response): .*the fields are"):
            read(name, source)


def test_a_run_follows_its_recipe_and_its_flags_come_first(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = dataset(tmp_path / "arc", ROWS["arc-challenge"][0], "ARC-Challenge", 8)
    flags = (
        "--model",
        model,
        "--data",
        source,
        "--steps",
        2,
        "--batch-size",
        2,
        "--max-length",
        64,
    )
    assert finetune("--recipe", "arc-challenge", *flags, "--lr", "losia=1e-3") == 0
    r = record(tmp_path / "runs" / "arc-challenge-losia-pro")
    a = r["arguments"]
    assert (a["period"], a["output_factor"], a["subset"]) == (
        50,
        1.0,
        "ARC-Challenge",
    )  # the recipe's
    assert (a["steps"], a["batch_size"], r["steps"]) == (2, 2, 2)  # the flags'
    assert a["lr"]["losia-pro"] == 5e-5 and a["lr"]["losia"] == 1e-3 and a["lr"]["full"] == 2e-5
    assert r["examples"]["train"] == 8 and r["examples"]["held_out"] == 8
    out = capsys.readouterr().out
    assert "losia-pro evaluate runs/arc-challenge-losia-pro/merged --tasks arc_challenge" in out


def test_of_a_file_a_recipe_asks_for_no_part(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:4])
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: someone/thing\nsubset: easy\nsplit: dev\nsteps: 2\n")
    found = recipes.expand({"recipe": str(mine), "data": str(path)})
    assert not found.keys() & {"subset", "split"} and found["steps"] == 2
    found = recipes.expand({"recipe": str(mine), "data": str(path), "subset": "hard"})
    assert found["subset"] == "hard"
    found = recipes.expand({"recipe": str(mine), "data": str(tmp_path)})
    assert (found["subset"], found["split"]) == ("easy", "dev")


def test_templates_read_records_of_any_fields_without_a_recipe(model, tmp_path, capsys):
    rows = [{"q": p["prompt"], "a": p["response"]} for p in PAIRS[:10]] + [
        {"q": "nothing", "a": ""}
    ]
    source = write_lines(tmp_path / "d.jsonl", rows)
    plain = write_lines(tmp_path / "p.jsonl", PAIRS[:10])
    found = data.load(str(source), prompt="{{ q }}", response="{{ a }}")
    assert "1 records left out: --response is empty there" in capsys.readouterr().err
    expected = data.load(str(plain))
    assert [r.content for r in found.train] == [r.content for r in expected.train]


def refused(capsys, *flags) -> str:
    assert finetune(*flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "unknown key 'batchsize'; the keys are about, tasks, model, data,"),
        ("output: out", "unknown key 'output'"),
        ("batch-size: 0", "argument --batch-size: must be 1 or more, got 0"),
        (
            "batch-size: four",
            "argument --batch-size: must be a whole number of 1 or more, got 'four'",
        ),
        ("period: true", "period must be text or a number, as it would follow the flag, got True"),
        ("prompt: {a: 1}", "prompt must be text or a number"),
        ("method: dora", "argument --method: invalid choice: 'dora'"),
        ("checkpointing: 1", "checkpointing must be true, or left out, got 1"),
        ("tasks: gsm8k", "tasks must be a list of names, got 'gsm8k'"),
        ("about: [a]", "about must be one line of text"),
        ("- a", "list where lines 'flag: value' are expected"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_recipe_is_named_with_its_key(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    err = refused(capsys, "--recipe", path, "--model", "m", "--data", "d")
    assert f"recipe {path}: " in err and message in err


def test_what_is_no_recipe_is_refused(tmp_path, capsys):
    assert "none of alpaca, arc-challenge," in refused(capsys, "--recipe", "gsm")
    assert "no such file" in refused(capsys, "--recipe", tmp_path / "no.yaml", "--model", "m")
    assert "--recipe piqa needs --model too" in refused(capsys, "--recipe", "piqa")


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ("{{ q }}", None, "--prompt and --response need each other"),
        ("{{ q", "{{ a }}", "--prompt '{{ q': "),
        ("{{ nope }}", "{{ a }}", r":1: --prompt: 'nope' is undefined; the fields are q, a"),
        ("{{ q }}", "{{ a.b }}", ":1: --response: .*has no attribute 'b'"),
        ("{{ q }}", "{{ [a] }}", "--response: list where text or a number is expected"),
        ("{{ q }}", "{{ none }}", "--response: NoneType where text or a number is expected"),
        ("{{ q.__class__.__mro__ }}", "{{ a }}", "--prompt: .*unsafe"),
    ],
)
def test_a_bad_template_is_named_with_the_record(tmp_path, prompt, response, message):
    source = write_lines(tmp_path / "d.jsonl", [{"q": "1", "a": "2"}] * 3)
    with pytest.raises(CliError, match=message):
        data.load(str(source), prompt=prompt, response=response)


def test_templates_need_records(tmp_path):
    (tmp_path / "d.txt").write_text("words")
    with pytest.raises(CliError, match="has no fields for --prompt"):
        data.load(str(tmp_path / "d.txt"), prompt="a", response="b")
    with pytest.raises(CliError, match="a JSON object is expected"):
        data.load(str(write_lines(tmp_path / "d.jsonl", [3])), prompt="a", response="b")


def test_recipes_are_listed_and_shown_as_they_are(tmp_path, capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ROWS) and "gsm8k" in out and "Llama-2-13b-hf" in out
    assert main(["recipes", "piqa"]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out)
    assert recipes.read(str(copy)) == recipes.read("piqa")
    assert main(["recipes", "nope"]) == 2
