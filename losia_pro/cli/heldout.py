"""The held-out loss and the exact-match accuracy: one definition each, for every method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .batches import Collate
from .encode import IGNORE, Sample


class Sums(NamedTuple):
    """``loss``: nats, over ``tokens``; ``right``: examples, of ``whole``."""

    loss: float
    tokens: int
    right: int
    whole: int


class Score(NamedTuple):
    """Held-out figures.

    ``loss``: mean negative log-likelihood of the trained tokens, in nats, every token weighing the same.
    ``exact``: share of the examples of which every trained token, the end of sequence included, is the
    model's most likely one given the right tokens before it; that is, greedy decoding would give exactly
    the reference. Examples that were cut to the maximum length do not count. None if there are none.
    """

    loss: float
    exact: float | None


def evaluate(
    model: Any,
    samples: Sequence[Sample],
    collate: Collate,
    batch_size: int,
    autocast: AbstractContextManager[Any] | None = None,
) -> Score:
    """Score a causal language model; its training mode is left as it was."""
    return score([sums(model, samples, collate, batch_size, autocast)])


def score(parts: Sequence[Sums]) -> Score:
    """Of all parts of the held-out samples together."""
    loss, tokens, right, whole = (sum(column) for column in zip(*parts, strict=True))
    return Score(loss / tokens, right / whole if whole else None)


@torch.no_grad()
def sums(
    model: Any,
    samples: Sequence[Sample],
    collate: Collate,
    batch_size: int,
    autocast: AbstractContextManager[Any] | None = None,
) -> Sums:
    """What ``evaluate`` adds up."""
    device = next(model.parameters()).device
    training, seen = model.training, collate.tokens
    model.eval()
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens, right, whole = 0, torch.zeros((), dtype=torch.int64, device=device), 0
    try:
        for start in range(0, len(order), batch_size):
            batch = [samples[i] for i in order[start : start + batch_size]]
            inputs = {k: v.to(device) for k, v in collate(batch).items()}
            labels = inputs.pop("labels")[:, 1:]
            trained = labels != IGNORE
            with autocast or nullcontext():
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            chosen = logits[trained].float()
            total += F.cross_entropy(chosen, labels[trained], reduction="sum").double()
            tokens += chosen.shape[0]
            hit = torch.ones_like(trained)
            hit[trained] = chosen.argmax(-1) == labels[trained]
            complete = torch.tensor([s.whole for s in batch], device=device)
            right += (hit.all(1) & complete).sum()
            whole += sum(s.whole for s in batch)
    finally:
        model.train(training)
        collate.tokens = seen
    return Sums(float(total), tokens, int(right), whole)
