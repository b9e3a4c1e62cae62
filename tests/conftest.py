"""What all tests share: those in tests/gpu need a CUDA device."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch

with suppress(ImportError):  # a GPU machine may run tests/gpu without it
    from hypothesis import settings

    # The first example of a test pays for torch's own warming up, and machines are shared.
    settings.register_profile("untimed", parent=settings(), deadline=None)
    settings.load_profile("untimed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The command line's flags of a tiny model and its data."""
    from cli_tools import make_data, make_model

    folder = tmp_path_factory.mktemp("base")
    return "--model", make_model(folder / "model"), "--data", make_data(folder / "data")


GPU = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
