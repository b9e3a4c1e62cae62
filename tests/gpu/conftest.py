"""What all GPU tests of the ops run under."""

from __future__ import annotations

import pytest
import torch

from losia_pro import dispatch


@pytest.fixture(params=dispatch.IMPLS)
def impl(request, monkeypatch):
    """Each implementation; buffers that it must fill start as NaN."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    return request.param
