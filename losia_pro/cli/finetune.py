"""``losia-pro finetune``: tune a causal language model, beside other methods if asked to."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options as settings
from . import recipes
from .errors import CliError
from .flags import add_arguments
from .processes import Processes, command, join, leave
from .rundir import RunFolder
from .values import file_path

if TYPE_CHECKING:
    from rich.console import Console

    from .job import Job
    from .methods import Tuned

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """The whole command; returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        CliError: for whatever the user can do something about.
    """
    given = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    resume = given.pop("resume", None)
    folder = _reopen(given, resume) if resume else None
    if folder is not None:
        options = argparse.Namespace(**folder.record["arguments"])
    else:
        options = settings.resolve(recipes.expand(given))
    _check_packages([options.method, *options.compare])
    from rich.console import Console

    from . import data
    from .job import choose_device

    device = choose_device(options.device)
    together = join(device)
    folder = _folder(options, folder, together)
    console = Console()
    if "model" not in given and not resume:
        console.print(f"No --model, no --data: the example. {settings.JOB_SAYS}", highlight=False)
    names = ("data", "eval_data", "split", "eval_split", "subset", "prompt", "response")
    loaded = data.load(*(getattr(options, name) for name in names))

    _be_quiet()
    from .job import make_job
    from .memory import REMEDIES, is_out_of_memory

    try:
        job = make_job(options, loaded, console, device, together)
        _begin(folder, job)
        done = all(
            method in folder.record["results"] or _tune(method, job, folder)
            for method in (options.method, *options.compare)
        )
        leave()
        if not done:
            return _stopped(console, folder)
        if together.first:
            _finish(folder, job)
    except KeyboardInterrupt:
        return _stopped(console, folder)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CliError(f"out of memory: {REMEDIES}") from error
    return 0


def _check_packages(methods: list[str]) -> None:
    """Everything that the run is going to import, before it begins."""
    needed = ["rich", "transformers", "accelerate", "matplotlib", *["peft"] * ("lora" in methods)]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise CliError(f"missing packages; pip install {' '.join(missing)}")


def _reopen(given: dict[str, Any], resume: str | bool) -> RunFolder:
    """The run to continue, if this version knows its settings and the flags that were given are its own."""
    output = given.pop("output", None)
    if resume is True:
        if output is None:
            raise CliError("--resume: which run? give --resume DIR")
        resume = output
    folder = RunFolder.open(file_path(str(resume)))
    if missing := settings.DEFAULTS.keys() - folder.record["arguments"].keys():
        raise CliError(
            f"--resume {folder.path}: the run's settings lack {', '.join(sorted(missing))}, which came with a later "
            "version of losia-pro; start the run afresh, or resume it with the version that began it"
        )
    changed = settings.differing(given, folder.record["arguments"])
    if changed:
        raise CliError(f"--resume continues a run with its own arguments; {'; '.join(changed)}")
    return folder


def _folder(
    options: argparse.Namespace, reopened: RunFolder | None, together: Processes
) -> RunFolder:
    """The run's folder: that of the first process, for all of them; or why there is none, that all end alike."""
    folder: RunFolder | CliError | None = reopened
    if folder is None and together.first:
        name = f"{Path(options.recipe or options.data).stem}-{options.method}"
        try:
            folder = RunFolder.choose(options.output, name, options.overwrite)
        except CliError as error:
            folder = error
    folder = together.all(folder)[0]
    if isinstance(folder, CliError):
        raise folder
    assert folder is not None
    before = folder.record.get("processes", 1)  # 1: of before there could be several
    if folder.record and before != together.size:
        raise CliError(
            f"--resume {folder.path}: the run's batches were planned for {before} process{'es' * (before > 1)}, and "
            f"there are {together.size}; continue it with {_resume(folder.path, before)}"
        )
    return folder


def _be_quiet() -> None:
    """No bars of other libraries beside ours, nor what they say of building a cache. Their warnings stay."""
    import logging

    from transformers.utils import logging as theirs

    switch: Any = theirs.disable_progress_bar
    switch()
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def _begin(folder: RunFolder, job: Job) -> None:
    """Say what is about to run, and measure the base model, once."""
    from . import report

    o, d = job.options, job.data
    _say(job.console, report.opening(job))
    digest = d.digest()
    if folder.record:
        if folder.record["data_digest"] != digest:
            raise CliError(f"{o.data}: the data has changed since the run in {folder.path} began")
        return
    model = job.load_model(o.method if job.training_dtype(o.method) == job.dtype else "lora")
    base = job.evaluate(model)
    if not math.isfinite(base.loss):
        raise CliError(
            f"--model {o.model}: its held-out loss is {base.loss} before training, in {job.precision}; give sound "
            "weights, or another --precision"
        )
    folder.record.update(
        status="running",
        arguments=vars(o),
        **report.environment(job.device),
        processes=job.together.size,
        precision=job.precision,
        steps=job.steps,
        examples={
            "train": len(d.train), "held_out": len(d.held_out), "cut": d.cut, "dropped": d.dropped
        },
        data_digest=digest,
        base=base._asdict(),
        results={},
    )  # fmt: skip
    if job.together.first:
        folder.make()  # not before: another run may be there, and this one may not have got so far
        folder.save()


def _tune(method: str, job: Job, folder: RunFolder) -> bool:
    """Train by one method, keep the main method's model, record the figures. False if stopped."""
    import torch

    from .interrupt import interruptible
    from .methods import prepare
    from .progress import print_line
    from .train import check_finite, train

    o = job.options
    checkpoint = job.together.all(folder.last_checkpoint(method))[0]
    torch.manual_seed(o.seed)
    calibrate = o.init == "calibrate" and checkpoint is None
    batches = job.batches[: o.calibration_batches] if calibrate else []
    calibration = [job.collate([job.data.train[i] for i in batch]) for batch in batches]
    tuned = prepare(method, job.load_model(method), o, calibration)
    with interruptible(job.console) as interrupt:
        outcome = train(method, tuned, job, folder.checkpoints(method), checkpoint, interrupt)
    if outcome.stopped:
        return False
    keep = method == o.method and job.together.first
    if keep and tuned.own:
        with folder.writing(tuned.own) as path:
            tuned.save(path)
    if tuned.losia is not None and "reselections" not in folder.record:
        folder.record["subnet_method"] = method
        folder.record["groups"] = [_common(group) for group in tuned.losia.groups]
        folder.record["reselections"] = [r._asdict() for r in tuned.losia.history]
        folder.record["subnet_share"] = _share(tuned.losia.modules.values())
    model = _plain(tuned, job)
    score = job.evaluate(model)
    check_finite(score.loss, method, o.lr[method])
    if not job.console.is_terminal:  # where it is one, the bar is there and the table is next
        print_line(job.console, method, job.steps, job.steps, f"held-out {score.loss:.3f}")
    if keep:
        with folder.writing("merged") as path:
            model.save_pretrained(path)
            job.tokenizer.save_pretrained(path)
    folder.record["results"][method] = {
        **score._asdict(),
        "trainable": tuned.trainable,
        "lr": o.lr[method],
        "seconds": outcome.seconds,
        "peak_bytes": outcome.peak,
        "train": outcome.train,
        "held_out": [*outcome.held_out, {"step": job.steps, "loss": score.loss}],
    }
    if job.together.first:
        folder.save()
        folder.drop_checkpoints(method)
    return True


def _plain(tuned: Tuned, job: Job) -> Any:
    """The tuned model as ``AutoModelForCausalLM`` will load it: plain, in the run's dtype."""
    model = tuned.finish()
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.to(job.dtype)
    return model


def _share(linears: Iterable[Any]) -> float:
    """The part of the linears' weights that is in their subnets."""
    sizes = [(linear.subnet.numel(), linear.weight.numel()) for linear in linears]
    return float(sum(n for n, _ in sizes) / sum(n for _, n in sizes))


def _common(names: list[str]) -> str:
    """What the names of one group share, e.g. ``model.layers.3``."""
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) or names[0]


def _finish(folder: RunFolder, job: Job) -> None:
    """The table, the pictures, and the list of files."""
    from . import plots, report

    record = folder.record
    with folder.writing("loss.png") as path:
        plots.loss(record, path)
    if record.get("reselections"):  # none by the defaults
        with folder.writing("subnets.png") as path:
            plots.subnets(record, path)
    record["status"] = "complete"
    folder.save()
    job.console.print(report.table(record))
    for line in report.notes(record):
        job.console.print(line, highlight=False)
    _say(job.console, ["", *report.files(folder.path)])
    if job.options.tasks:
        tasks = ["--tasks", ",".join(job.options.tasks)]
        words = ["losia-pro", "evaluate", str(folder.path / "merged"), *tasks]
        _say(job.console, ["", "the recipe's tasks:", f"  {shlex.join(words)}"])


def _say(console: Console, lines: list[str]) -> None:
    """Lines that hold paths: not to be broken."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _resume(folder: Path, processes: int) -> str:
    """The command that continues a run."""
    return shlex.join([*command(processes), "finetune", "--resume", str(folder)])


def _stopped(console: Console, folder: RunFolder) -> int:
    """After Ctrl-C."""
    if folder.record:
        again = _resume(folder.path, folder.record.get("processes", 1))
        console.print(f"Stopped. Continue with:\n  {again}", highlight=False, soft_wrap=True)
    else:
        console.print("Stopped; nothing was written.")
    return 130
