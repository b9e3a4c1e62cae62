"""benchmarks/quality/table.py: the table of a record in Markdown; README's is the recorded one, and one command's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.quality import __main__ as command
from benchmarks.quality import choice, corpora, record, settings, sources, table
from benchmarks.quality.methods import METHODS

from losia_pro.cli.errors import CliError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECORD = ROOT / "benchmarks" / "results" / "quality-26m.json"


def made_up() -> dict:
    """Two methods on a text and a structured task."""
    rows = [
        row("lora-r8", "cpp", 1.5, 0.75),
        row("lora-r8", "imports", 1.2, 0.9, exact=0.25),
        row("full", "cpp", 1.0, 0.9, p=0.0312),
        row("full", "imports", 1.0, 0.95, p=0.00001, exact=0.8125),
    ]
    runs = [
        {"method": "base", "target": "cpp", "test_loss": 2.0, "old_loss": 0.7},
        {"method": "base", "target": "imports", "test_loss": 2.0, "old_loss": 0.7, "test_exact": 0.01},
    ]  # fmt: skip
    plan = {"methods": ["lora-r8", "full"], "targets": ["cpp", "imports"]}
    return {"plan": plan, "rows": rows, "runs": runs}


def row(method: str, target: str, loss: float, old: float, p=None, exact=None) -> dict:
    against = {} if p is None else {"lora-r8": {"test_loss_p": p, "old_loss_p": 0.5}}
    found = {
        "method": method,
        "target": target,
        "against": against,
        "trainable": 1234 * len(method),
    }
    found |= {"test_loss": loss, "old_loss": old, "recovered": 2.0 - loss}
    return found | ({} if exact is None else {"test_exact": exact})  # fmt: skip


def test_the_table_of_a_record():
    gains, kept = table.markdown(made_up()).split("\n\n")
    assert gains.splitlines() == [
        "| of full's gain | trained values | cpp | imports | mean |",
        "|---|--:|--:|--:|--:|",
        "| full | 4,936 | 100.0% (.031) | 100.0% (<.001) | 100.0% |",
        "| lora-r8 | 8,638 | 50.0% | 80.0% | 65.0% |",
    ]
    assert kept.splitlines() == [
        "| old-domain loss | after cpp | after imports | imports: exact |",
        "|---|--:|--:|--:|",
        "| the base model | 0.700 | 0.700 | 1.0% |",
        "| full | 0.900 (.500) | 0.950 (.500) | 81.2% |",
        "| lora-r8 | 0.750 | 0.900 | 25.0% |",
    ]


def test_a_record_without_all_final_runs_makes_no_table():
    content = made_up()
    del content["rows"][2]
    with pytest.raises(ValueError, match="no final runs of full, cpp: the record is not complete"):
        table.markdown(content)


def test_a_record_without_full_fine_tuning_makes_no_table():
    """Its gain is what the table's shares are of."""
    content = made_up()
    content["plan"]["methods"].remove("full")
    content["rows"] = [
        {k: v for k, v in r.items() if k != "recovered"}
        for r in content["rows"]
        if r["method"] != "full"
    ]
    with pytest.raises(ValueError, match="no final runs of full, cpp; full, imports"):
        table.markdown(content)


@pytest.mark.parametrize("text", [None, '{"key": 1}\n{"key": 2}\n', "{}", "[]"])
def test_what_is_no_record_is_not_summarized(text, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    if text is not None:
        path.write_text(text)
    assert command.main(["--summarize", str(path)]) == 2
    assert f"--summarize {path}: no record" in capsys.readouterr().err


def test_the_plain_command_trains_the_tables_methods():
    args = command.parser().parse_args([])
    assert command._methods(args) == table.METHODS and set(table.METHODS) < set(METHODS)
    assert choice.targets(args, choice.ORDER) == list(choice.ORDER[:5])
    assert (args.size, args.budget, args.seeds) == ("26m", 3000.0, 5)
    assert args.budget + 600 <= 3600  # with its start, an hour
    args = command.parser().parse_args("--tiers 3 --size toy --targets all".split())
    assert command._methods(args) == [m for m in METHODS if METHODS[m].tier == 3]
    assert choice.targets(args, {"docs", "cpp"}) == ["cpp", "docs"]


def test_the_table_of_the_readme_is_the_recorded_one_and_one_commands():
    """Once there is a record of the final runs, the README must show it, and the plain command must repeat it."""
    text = README.read_text()
    if not RECORD.exists():
        assert RECORD.name not in text
        return
    head, _ = record.read(RECORD)
    shown = table.markdown(json.loads(RECORD.read_text()))
    for part in shown.split("\n\n"):
        assert part in text, f"README.md lacks, of `python -m benchmarks.quality.table`:\n{part}"
    args = command.parser().parse_args([])
    plan = head["plan"]
    assert head["study"] is None
    assert all(row["n"] == args.seeds for row in json.loads(RECORD.read_text())["rows"])
    assert set(plan["methods"]) == set(table.METHODS)
    assert plan["targets"] == choice.targets(args, choice.ORDER)
    assert (plan["seeds"], plan["tuning_seeds"]) == (args.seeds, args.tuning_seeds)
    assert head["setting"] == settings.dataclasses.asdict(command._setting(args))


def test_a_target_that_the_machine_lacks_is_refused_and_none_but_those_asked_for_are_looked_for():
    args = command.parser().parse_args("--targets docs,man --size toy".split())
    assert choice.wanted(args) == (["docs", "man"], 2)
    assert choice.targets(args, {"man", "docs", "cpp"}) == ["docs", "man"]
    with pytest.raises(CliError, match="--targets man: this machine has too little text for it"):
        choice.targets(args, {"docs"})


def test_only_the_text_of_the_wanted_targets_is_read(monkeypatch):
    read = []
    text = {"train": ["x" * 60_000], "valid": ["y" * 1_000], "test": ["z" * 1_000]}
    monkeypatch.setattr(
        corpora, "split", lambda source, most: read.append(source) or dict.fromkeys(text, [])
    )
    domains, about = corpora.build(settings.SIZES["toy"], ["cpp"], 1)
    assert read == [sources.TEXTS[sources.PYTHON], sources.TEXTS["cpp"]]
    assert domains == {} and set(about) == {sources.PYTHON, "cpp"}
    read.clear()
    monkeypatch.setattr(corpora, "split", lambda source, most: read.append(source) or text)
    domains, _ = corpora.build(settings.SIZES["toy"], choice.ORDER, 1)
    assert set(domains) == {sources.PYTHON, "cpp"} and len(read) == 2
