"""Training data: read and checked at the door, tokenized, masked, cut, batched."""

from __future__ import annotations

import json

import pytest
import torch
from cli_tools import PAIRS, make_tokenizer, write_lines

from losia_pro.cli.batches import Collate, plan
from losia_pro.cli.data import Data, Record, load
from losia_pro.cli.encode import IGNORE, Sample, encode
from losia_pro.cli.errors import CliError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "green?"},
    {"role": "assistant", "content": "\nplum"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def data(kind: str, *contents) -> Data:
    records = [Record(f"file:{i + 1}", c) for i, c in enumerate(contents)]
    return Data(kind, records, records[:1], 0.5, "file")


def trained(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORE]


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": "b"', "not a JSON object"),
        ("hello", "not a JSON object"),
        ("[1, 2]", "list where a JSON object is expected"),
        ("{}", "the fields are none"),
        ('{"question": "a", "answer": "b"}', "the fields are question, answer"),
        ('{"prompt": "a", "response": 3}', "response is int"),
        ('{"prompt": null, "response": "b"}', "prompt is NoneType"),
        ('{"prompt": "a", "response": ""}', "response is empty"),
        ('{"text": "a"}', "text, but .*:1 has prompt/response"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages, but .*:1 has prompt/resp"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "d.jsonl", [*PAIRS[:2], "", line])
    with pytest.raises(CliError, match=message) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}:4: ")


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
    path = write_lines(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": messages}])
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


def test_an_unknown_dataset_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(CliError, match=r"someone/thing: .*not a readable dataset \(no network\)"):
        load("someone/thing")


def test_a_named_dataset_is_read_with_its_test_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": PAIRS[:5], "test": PAIRS[5:7]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(splits))
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


def test_a_held_out_split_must_exist_and_a_share_lie_within_0_and_1(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", PAIRS[:4])
    with pytest.raises(CliError, match="no such split"):
        load(str(path), eval_split="test")
    with pytest.raises(CliError, match="between 0 and 1"):
        load(str(path), eval_split="3")
    write_lines(path, PAIRS[:1])
    with pytest.raises(CliError, match="one example only"):
        load(str(path))


# --- tokens and labels -----------------------------------------------------------------------------


def test_only_the_response_and_the_end_are_trained(tokenizer):
    sample = encode(data("pairs", ("say red:", " blue!")), tokenizer, 64).train[0]
    prompt = tokenizer("say red:").input_ids
    assert sample.ids[: len(prompt)] == prompt
    assert trained(sample) == [*tokenizer(" blue!").input_ids, tokenizer.eos_token_id]
    assert sample.ids[len(prompt) :] == trained(sample)


def test_the_prompt_has_the_tokens_that_it_has_alone(tokenizer):
    # " blue" is one token; a prompt that ends in a space must keep the space as its own.
    assert len(tokenizer(" blue").input_ids) == 1
    sample = encode(data("pairs", ("say red: ", "blue!")), tokenizer, 64).train[0]
    prompt = tokenizer("say red: ").input_ids
    assert sample.ids[: len(prompt)] == prompt
    assert tokenizer.decode(trained(sample)) == "blue!<eos>"


def test_leading_special_tokens_are_kept_and_closing_ones_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    both = make_tokenizer(bos_token="<bos>")
    both._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 0)]
    )
    assert both("a").input_ids[0] == 2 and both("a").input_ids[-1] == 0
    for kind, content in (("pairs", ("say", " red")), ("text", "say red"), ("pairs", ("", "red"))):
        sample = encode(data(kind, content), both, 64).train[0]
        assert sample.ids[0] == 2 and sample.ids.count(2) == 1
        assert sample.ids[-1] == 0 and sample.ids.count(0) == 1


def test_all_of_a_text_is_trained(tokenizer):
    sample = encode(data("text", "red green"), tokenizer, 64).train[0]
    assert sample.labels == sample.ids == [*tokenizer("red green").input_ids, 0]


def test_long_examples_are_cut_and_those_with_nothing_left_dropped(tokenizer):
    n = len(tokenizer("say red:").input_ids)
    found = encode(
        data("pairs", ("say", " red"), ("say red:", " blue" * 20), ("red " * 30, "!")),
        tokenizer,
        n + 3,
    )
    assert (found.cut, found.dropped) == (1, 1)
    assert [s.whole for s in found.train] == [True, False]
    assert [len(s.ids) for s in found.train][1] == n + 3 and trained(found.train[1])
    with pytest.raises(CliError, match="raise --max-length"):
        encode(data("pairs", ("red " * 30, "!")), tokenizer, 8)


@pytest.mark.parametrize("fast", [True, False])
def test_only_the_assistants_turns_of_a_chat_are_trained(fast, monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    sample = encode(data("chat", CHAT), tokenizer, 512).train[0]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(sample.ids) == text
    spans = tokenizer.decode(trained(sample)).split("<eos>")
    assert [s.strip() for s in spans] == ["blue", "plum", ""]
    assert "### user\nred?" in text


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_tokenizers_own_chat_template_is_used():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    sample = encode(data("chat", CHAT), tokenizer, 512).train[0]
    assert tokenizer.decode(sample.ids).startswith("<|system|>be brief<eos>")
    assert tokenizer.decode(trained(sample)) == "blue<eos>\n\nplum<eos>\n"


def test_a_chat_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(CliError, match=r"^file:1: the chat template shows message 3 differently"):
        encode(data("chat", CHAT), tokenizer, 512)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(CliError, match=r"^file:1: the chat template refuses it \(no system role"):
        encode(data("chat", CHAT), tokenizer, 512)


def test_a_text_file_is_cut_into_full_blocks_and_its_end_held_out(tmp_path, tokenizer):
    path = tmp_path / "d.txt"
    path.write_text("red green blue\n" * 40)
    ids = tokenizer(path.read_text()).input_ids
    found = encode(load(str(path), eval_split="0.25"), tokenizer, 10)
    blocks = [*found.train, *found.held_out]
    assert len(blocks) == len(ids) // 10 and len(found.held_out) == round(len(blocks) / 4)
    assert [i for b in blocks for i in b.ids] == ids[: 10 * len(blocks)]
    assert all(b.labels == b.ids for b in blocks)
    assert len(encode(load(str(path), str(path)), tokenizer, 10).held_out) == len(blocks)
    with pytest.raises(CliError, match="fills one block"):
        encode(load(str(path)), tokenizer, len(ids))
    with pytest.raises(CliError, match="do not fill one block"):
        encode(load(str(path)), tokenizer, len(ids) + 1)


def test_the_digest_tells_other_data_apart(tokenizer):
    a, b = data("text", "red", "green"), data("text", "red", "blue")
    assert encode(a, tokenizer, 9).digest() == encode(a, tokenizer, 9).digest()
    assert encode(a, tokenizer, 9).digest() != encode(b, tokenizer, 9).digest()


# --- batches ---------------------------------------------------------------------------------------


def test_every_sample_is_seen_once_an_epoch_and_the_plan_is_a_function_of_its_arguments():
    lengths = [(i * 37) % 23 + 1 for i in range(103)]
    batches = plan(lengths, 8, 2 * 13, seed=1)
    for epoch in (batches[:13], batches[13:]):
        assert sorted(i for b in epoch for i in b) == list(range(103))
    assert batches == plan(lengths, 8, 2 * 13, seed=1)
    assert batches[:13] == plan(lengths, 8, 13, seed=1)
    assert batches != plan(lengths, 8, 2 * 13, seed=2)
    assert batches[:13] != batches[13:]


def test_batches_hold_samples_of_like_length_in_no_order_of_length():
    lengths = [(i * 37) % 500 + 1 for i in range(800)]
    batches = plan(lengths, 8, 100, seed=0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_padding_is_masked_and_not_trained():
    batch = Collate(pad_id=7)([Sample([1, 2, 3], [-100, 2, 3], True), Sample([4], [4], True)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert all(t.dtype == torch.int64 for t in batch.values())


def test_json_with_windows_line_ends_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(p) for p in PAIRS[:3]).encode())
    assert len(load(str(path)).train) == 2
