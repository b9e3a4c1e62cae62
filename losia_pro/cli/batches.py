"""Which samples make which batch, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .encode import IGNORE, Sample

CHUNK = 50  # batches that are sorted by length together


def plan(lengths: Sequence[int], batch_size: int, n_batches: int, seed: int) -> list[list[int]]:
    """Indices of each batch of a whole run: epoch after epoch, every sample once an epoch.

    Within an epoch samples are shuffled, then grouped by length within chunks, so that little of a batch
    is padding; the batches are shuffled again. A function of its arguments alone, so the same for every
    method, and for a run that is resumed.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < n_batches:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        size = CHUNK * batch_size
        epoch = []
        for start in range(0, len(order), size):
            chunk = sorted(order[start : start + size], key=lambda i: -lengths[i])
            epoch += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[:n_batches]


class Collate:
    """Pads samples on the right to the longest: int64 ``input_ids``, ``attention_mask``, ``labels``,
    each ``(batch, length)``. Counts the tokens it has seen in ``tokens``."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.tokens = 0

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        shape = len(samples), max(len(s.ids) for s in samples)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, sample in enumerate(samples):
            n = len(sample.ids)
            ids[row, :n] = torch.tensor(sample.ids)
            labels[row, :n] = torch.tensor(sample.labels)
            mask[row, :n] = 1
            self.tokens += n
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
