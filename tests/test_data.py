"""Training data: read and checked at the door."""

from __future__ import annotations

import json
import logging

import pytest
from cli_tools import PAIRS, write_lines

from losia_pro.cli import hub, named
from losia_pro.cli.data import load
from losia_pro.cli.errors import CliError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": "b"', "not a JSON object"),
        ("hello", "not a JSON object"),
        (
            "[1, 2]",
            "list where a JSON object is expected; the file must hold one JSON object a line",
        ),
        ("{}", "the fields are none"),
        ('{"question": "a", "answer": "b"}', "the fields are question, answer"),
        ('{"prompt": "a", "response": 3}', "response is int"),
        ('{"prompt": null, "response": "b"}', "prompt is NoneType"),
        ('{"prompt": "a", "response": ""}', "response is empty"),
        ('{"text": "a"}', "text, but .*:1 has prompt/response"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages, but .*:1 has prompt/resp"),
        ('{"prompt": "a", "response": "b \\ud83d"}', r"'\\ud83d' alone is no character"),
        ('{"prompt": %s}' % ("1" * 5000), "cannot be read .*4300 digits"),
        ("[" * 200_000, "cannot be read .*recursion"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "d.jsonl", [*PAIRS[:2], "", line])
    with pytest.raises(CliError, match=message) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}:4: ")


GOOD = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        ([{"role": "user"}], "message 1 needs role and content"),
        ([{"role": "user", "content": "a"}, {"role": 1, "content": "b"}], "message 2 needs"),
        ([{"role": "user", "content": "a"}], "no message has the role assistant"),
    ],
)
def test_a_bad_chat_is_named(tmp_path, messages, message):
    path = write_lines(tmp_path / "d.jsonl", [{"messages": GOOD}, {"messages": messages}])
    with pytest.raises(CliError, match=message) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}:2: ")


def test_an_empty_file_is_refused(tmp_path):
    for name in ("d.jsonl", "d.txt"):
        (tmp_path / name).write_text(" \n\n")
        with pytest.raises(CliError, match=r"d\.(jsonl|txt): the file is empty"):
            load(str(tmp_path / name))


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CliError, match=r"d\.jsonl:2: not UTF-8"):
        load(str(path))


@pytest.mark.parametrize("name", ["no/such.jsonl", "./missing", "/nowhere"])
def test_a_missing_path_is_refused(name):
    with pytest.raises(CliError, match="no such file or folder"):
        load(name)


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.parquet"])
def test_a_table_is_not_taken_for_a_text(tmp_path, name):
    (tmp_path / name).write_text("prompt,response\na,b\n")
    with pytest.raises(CliError, match=rf"{name}: a table, .* as JSONL"):
        load(str(tmp_path / name))


def test_an_unknown_dataset_is_refused_and_the_clients_retries_are_kept_quiet(
    monkeypatch, capsys, caplog
):
    datasets = pytest.importorskip("datasets")
    client = logging.getLogger("huggingface_hub.utils")
    monkeypatch.setattr(client.parent, "propagate", True)  # so that caplog could hear it

    def offline(*args, **kwargs):
        client.warning("Retrying in 1s [Retry 1/5]")
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(
        CliError, match=r"someone/thing: .*not a readable dataset on the hub \(no network\)$"
    ):
        load("someone/thing")
    assert "no file or folder someone/thing here" in capsys.readouterr().err
    assert not caplog.records
    client.warning("heard again")
    assert caplog.messages == ["heard again"]


@pytest.mark.parametrize("name", ["name", "owner/name", "teknium/OpenHermes-2.5", "a/b.c_d"])
def test_a_hub_id_may_have_a_dot(name):
    assert hub.is_on_the_hub(name)


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    for name in ("a/b/c", "/a", "./a", "../a", "~/a", "a.jsonl", "b/a.txt", "a.csv"):
        assert not hub.is_on_the_hub(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name").mkdir()
    assert not hub.is_on_the_hub("name")


def test_json_lines_are_not_taken_for_a_text(tmp_path):
    rows = '\n{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n'
    for name in ("d.jsonlines", "d", "d.log"):
        (tmp_path / name).write_text(rows)
        with pytest.raises(
            CliError, match=rf"{name}: its first line is a JSON object; name the file .jsonl"
        ):
            load(str(tmp_path / name))
    (tmp_path / "d.txt").write_text(rows)
    assert load(str(tmp_path / "d.txt")).kind == "document"
    (tmp_path / "e.py").write_text("{}.get(1)\n")
    assert load(str(tmp_path / "e.py")).kind == "document"


def test_a_named_dataset_is_read_with_its_test_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": PAIRS[:5], "test": PAIRS[5:7]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: splits[split])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: list(splits))
    found = load("someone/thing")
    assert (found.kind, len(found.train), len(found.held_out)) == ("pairs", 5, 2)
    assert found.held_out[1].where == "someone/thing[test] row 1"


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(PAIRS[:5]),
            "validation": datasets.Dataset.from_list(PAIRS[5:7]),
        }
    )
    both.save_to_disk(str(tmp_path / "both"))
    found = load(str(tmp_path / "both"))
    assert [len(found.train), len(found.held_out)] == [5, 2]
    with pytest.raises(CliError, match="no split 'dev'; it has train, validation"):
        load(str(tmp_path / "both"), eval_split="dev")
    both["train"].save_to_disk(str(tmp_path / "one"))
    found = load(str(tmp_path / "one"), eval_split="0.4")
    assert [len(found.train), len(found.held_out)] == [3, 2]


def test_a_folder_gives_its_own_held_out_file(tmp_path):
    write_lines(tmp_path / "train.jsonl", PAIRS[:5])
    write_lines(tmp_path / "valid.jsonl", PAIRS[5:8])
    found = load(str(tmp_path))
    assert [r.content[0] for r in found.held_out] == [p["prompt"] for p in PAIRS[5:8]]
    with pytest.raises(CliError, match="split 'dev' cannot be read"):
        load(str(tmp_path), eval_split="dev")


def test_held_out_examples_are_chosen_once_and_never_trained(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:40])
    found, again = load(str(path), eval_split="0.25"), load(str(path), eval_split="0.25")
    assert found == again and len(found.held_out) == 10
    everything = {r.where for r in found.train} | {r.where for r in found.held_out}
    assert len(everything) == 40 == len(found.train) + len(found.held_out)


def test_held_out_data_of_its_own_must_be_of_the_same_kind(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:4])
    other = write_lines(tmp_path / "e.jsonl", [{"text": "hi"}])
    (tmp_path / "e.txt").write_text("hi")
    assert len(load(str(path), str(path)).held_out) == 4
    for wrong in (other, tmp_path / "e.txt"):
        with pytest.raises(CliError, match=r"text.*training data"):
            load(str(path), str(wrong))


def test_held_out_data_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:4])
    monkeypatch.setattr(named, "splits", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(CliError, match="gone.jsonl: no such file or folder"):
        load(str(path), "gone.jsonl")


def test_a_held_out_split_must_exist_and_a_share_lie_within_0_and_1(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:4])
    with pytest.raises(CliError, match="no such split"):
        load(str(path), eval_split="test")
    with pytest.raises(CliError, match="between 0 and 1"):
        load(str(path), eval_split="3")
    write_lines(path, PAIRS[:1])
    with pytest.raises(CliError, match="one example only"):
        load(str(path))


@pytest.mark.parametrize("part", [{"split": "dev"}, {"subset": "easy"}])
def test_a_part_of_a_file_is_refused_before_it_is_read(tmp_path, part):
    path = write_lines(tmp_path / "d.jsonl", ["not read"])
    ((flag, name),) = part.items()
    said = f"--{flag} {name}: {path} is a file, which is read whole; {flag}s are of a dataset"
    for held_out in (None, str(path)):
        with pytest.raises(CliError, match=said):
            load(str(path), held_out, **part)


@pytest.mark.parametrize("saved", [False, True])
def test_a_subset_of_a_folder_that_has_none_is_refused(tmp_path, saved):
    write_lines(tmp_path / "train.jsonl", PAIRS[:4])
    if saved:
        (tmp_path / "train.jsonl").rename(tmp_path / "dataset_dict.json")
    with pytest.raises(
        CliError, match=f"--subset easy: {tmp_path} has none; datasets on the hub may"
    ):
        load(str(tmp_path), subset="easy")


def test_a_part_may_be_that_of_the_held_out_dataset_alone(tmp_path, monkeypatch):
    path, asked = write_lines(tmp_path / "d.jsonl", PAIRS[:4]), []
    monkeypatch.setattr(named, "datasets", lambda: None)
    monkeypatch.setattr(named, "splits", lambda *_: ["test"])
    monkeypatch.setattr(named, "rows", lambda *of: asked.append(of) or [("row 0", PAIRS[5])])
    assert len(load(str(path), "someone/thing", subset="easy").held_out) == 1
    assert asked == [("someone/thing", "test", "easy")]


def test_json_with_windows_line_ends_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(p) for p in PAIRS[:3]).encode())
    assert len(load(str(path)).train) == 2
