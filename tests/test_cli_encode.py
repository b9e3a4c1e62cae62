"""Training examples: tokenized, masked, cut, batched."""

from __future__ import annotations

import logging

import pytest
import torch
from cli_tools import make_tokenizer

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
def test_only_the_assistants_turns_of_a_chat_are_trained(fast, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    sample = encode(data("chat", CHAT), tokenizer, 512).train[0]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(sample.ids) == text
    spans = tokenizer.decode(trained(sample)).split("<eos>")
    assert [s.strip() for s in spans] == ["blue", "plum", ""]
    assert "### user\nred?" in text
    assert "no chat template; turns begin with '### user'" in capsys.readouterr().err


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


def test_a_text_file_is_cut_into_full_blocks_and_its_end_held_out(
    tmp_path, tokenizer, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "model_max_length", 10)
    path = tmp_path / "d.txt"
    path.write_text("red green blue\n" * 40)
    ids = tokenizer(path.read_text(), verbose=False).input_ids
    found = encode(load(str(path), eval_split="0.25"), tokenizer, 10)
    blocks = [*found.train, *found.held_out]
    assert len(blocks) == len(ids) // 10 and len(found.held_out) == round(len(blocks) / 4)
    assert [i for b in blocks for i in b.ids] == ids[: 10 * len(blocks)]
    assert all(b.labels == b.ids for b in blocks)
    assert len(encode(load(str(path), str(path)), tokenizer, 10).held_out) == len(blocks)
    assert not caplog.records  # transformers warns of texts that are longer than the model reads
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
