"""``losia-pro finetune`` where the second process alone gets Ctrl-C, while it measures its second held-out loss."""

import os
import signal
import sys

from losia_pro.cli import main
from losia_pro.cli.job import Job

evaluate, seen = Job.evaluate, []


def interrupted(job, model):
    seen.append(model)
    if len(seen) == 2 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGINT)
    return evaluate(job, model)


Job.evaluate = interrupted  # type: ignore[method-assign]
sys.exit(main())
