"""Records to token ids and labels. Tokens that are not trained have the label -100."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .data import Data, Record
from .errors import CliError

IGNORE = -100  # the label that the loss leaves out

# For tokenizers that bring none; put into the tokenizer, so that the saved model has it too.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


class Sample(NamedTuple):
    """Token ids and labels of one example; ``whole`` is False if it was cut to the maximum length."""

    ids: list[int]
    labels: list[int]
    whole: bool


@dataclass(frozen=True)
class Encoded:
    """``cut`` samples were shortened to the maximum length; ``dropped`` had nothing left to train."""

    train: list[Sample]
    held_out: list[Sample]
    cut: int
    dropped: int

    def digest(self) -> str:
        """Identifies the training samples, so that a run is resumed on the same data."""
        h = hashlib.sha256()
        for sample in self.train:
            h.update(repr((sample.ids, sample.labels)).encode())
        return h.hexdigest()


def encode(data: Data, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize, mask what is not trained, and cut to ``max_length`` tokens.

    Raises:
        CliError: a chat template that does not keep earlier turns as they were; nothing left to train.
    """
    if data.kind == "document":
        return _documents(data, tokenizer, max_length)
    if data.kind == "chat" and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        print(
            "The tokenizer has no chat template; turns begin with '### user' and '### assistant', and the template is "
            "saved with the model",
            file=sys.stderr,
        )
    cut = dropped = 0
    parts = []
    for records in (data.train, data.held_out or []):
        samples = []
        for record in records:
            ids, labels = ENCODERS[data.kind](record, tokenizer)
            sample = Sample(ids[:max_length], labels[:max_length], len(ids) <= max_length)
            if all(label == IGNORE for label in sample.labels[1:]):  # the first is never predicted
                dropped += 1
                continue
            cut += not sample.whole
            samples.append(sample)
        if not samples:
            raise CliError(
                f"{data.source}: no example has anything left to train within {max_length} tokens; "
                "raise --max-length"
            )
        parts.append(samples)
    return Encoded(parts[0], parts[1], cut, dropped)


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    # Not verbose: it would warn of texts that are longer than the model reads, which are cut anyway.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _leading(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a prompt; not those it puts after a text."""
    plain, ids = _ids(tokenizer, "a"), _ids(tokenizer, "a", special=True)
    at = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[: next(at, 0)]


def _pair(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The prompt's tokens are those that it has alone; prompt and response are joined as they are. The
    response ends with the end-of-sequence token."""
    prompt, response = record.content
    head, joint = _ids(tokenizer, prompt), _ids(tokenizer, prompt + response)
    same = joint[: len(head)] == head
    tail = (joint[len(head) :] if same else _ids(tokenizer, response)) + _end(tokenizer)
    head = _leading(tokenizer) + head
    return head + tail, [IGNORE] * len(head) + tail


def _text(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    ids = _leading(tokenizer) + _ids(tokenizer, record.content) + _end(tokenizer)
    return ids, list(ids)


def _chat(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Train what the template adds for an assistant's turn after its generation prompt."""
    messages = record.content
    try:
        text, spans = _chat_spans(messages, tokenizer)
    except CliError as error:
        raise CliError(f"{record.where}: {error}") from error
    except Exception as error:  # the template's own refusal, e.g. of a role or of an order of roles
        raise CliError(f"{record.where}: the chat template refuses it ({error})") from error
    if tokenizer.is_fast:
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, labels = list(encoding["input_ids"]), []
        for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True):
            trained = start < end and any(a <= start < b for a, b in spans)
            labels.append(token if trained else IGNORE)
        return ids, labels
    ids, labels, done = [], [], 0
    for a, b in spans:
        before, turn = _ids(tokenizer, text[done:a]), _ids(tokenizer, text[a:b])
        ids += before + turn
        labels += [IGNORE] * len(before) + turn
        done = b
    rest = _ids(tokenizer, text[done:])
    return ids + rest, labels + [IGNORE] * len(rest)


def _chat_spans(
    messages: Sequence[dict[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    def render(count: int, prompt: bool = False) -> str:
        shown = messages[:count]
        text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt)
        return str(text)

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True) if i else "", render(i + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise CliError(
                f"the chat template shows message {i + 1} differently alone than in the whole chat, so "
                "what the model would have to say there is not defined; split the chat so that each "
                "example ends with the turn to train, or use prompt/response"
            )
        spans.append((len(before), len(after)))
    return text, spans


ENCODERS = {"pairs": _pair, "text": _text, "chat": _chat}


def _documents(data: Data, tokenizer: Any, max_length: int) -> Encoded:
    """One stream of tokens a file, cut into blocks of ``max_length``; the last share of them is held out,
    unless there is a file of its own for that. A rest that fills no block is left out."""

    def blocks(records: list[Record]) -> list[Sample]:
        ids = _ids(tokenizer, "".join(r.content for r in records))
        ends = range(max_length, len(ids) + 1, max_length)
        found = [ids[end - max_length : end] for end in ends]
        if not found:
            raise CliError(
                f"{records[0].where}: {len(ids)} tokens do not fill one block of {max_length}; "
                "lower --max-length"
            )
        return [Sample(block, block, True) for block in found]

    train = blocks(data.train)
    if data.held_out is not None:
        return Encoded(train, blocks(data.held_out), 0, 0)
    if len(train) < 2:
        raise CliError(
            f"{data.source}: it fills one block of {max_length} tokens only, and one is needed for the "
            "test; lower --max-length or give --eval-data"
        )
    n = max(1, round(len(train) * data.share))
    return Encoded(train[:-n], train[-n:], 0, 0)
