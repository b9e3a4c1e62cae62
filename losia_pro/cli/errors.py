"""The one exception that a user sees as a sentence, and who of several processes says it."""

from __future__ import annotations

import os
import time

PATIENCE = 10.0  # seconds


class CliError(Exception):
    """What went wrong and what would do; printed as one red line, exit code 2."""


def let_the_first_speak() -> None:
    """Wait before an error is said, in each process but the first that ``torchrun`` started on this machine. What all
    of them find the first says, and ``torchrun`` then ends the others; who is left found it alone, and says it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
