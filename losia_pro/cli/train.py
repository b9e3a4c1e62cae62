"""One method's training, on Hugging Face ``Trainer``."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from losia_pro.optim import AdamW

from .errors import CliError
from .interrupt import Interrupt
from .job import Job
from .memory import Peak
from .methods import Tuned
from .options import SCHEDULERS
from .progress import TrainingProgress, training_progress
from .rundir import written


@dataclass
class Outcome:
    """``train``: step, loss and lr of each log; ``held_out``: step and loss; ``seconds``: training alone,
    over all parts of a resumed run; ``peak``: bytes; ``stopped``: by Ctrl-C, with a checkpoint."""

    train: list[dict[str, float]]
    held_out: list[dict[str, float]]
    seconds: float
    peak: int
    stopped: bool


class PlannedTrainer(Trainer):
    """Trains on the job's batches as planned, and evaluates by our definition."""

    def __init__(
        self, method: str, job: Job, progress: TrainingProgress, peak: Peak, **kwargs: Any
    ) -> None:
        super().__init__(train_dataset=job.data.train, eval_dataset=job.data.held_out, **kwargs)
        self.method, self.job, self.progress, self.peak = method, job, progress, peak
        self.seconds = 0.0  # before this part of the run
        self.begun = time.perf_counter()
        self.tokens = 0

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.job.batches,
            collate_fn=self.job.collate,
            pin_memory=self.args.device.type == "cuda",
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint holds a tied weight once; its other name is not missing."""
        model: Any = self.model
        once = {name for name, _ in model.named_parameters()}
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        missing = [name for name in load_result.missing_keys if name not in every - once]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.state.global_step == self.state.max_steps:
            return {}  # the finished model is about to be evaluated
        begun = time.perf_counter()
        loss = self.job.evaluate(self.model).loss
        check_finite(loss, self.method, self.args.learning_rate)
        self.begun += time.perf_counter() - begun
        self.state.log_history.append({"eval_loss": loss, "step": self.state.global_step})
        self.progress.evaluated(self.state.global_step, loss)
        self.control.should_evaluate = False  # a stop ends the epoch, where Trainer asks again
        return {"eval_loss": loss}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with written(f"a checkpoint in {self.args.output_dir}"):
            super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["seconds"] = self.seconds + time.perf_counter() - self.begun
        super().log(logs, start_time)
        if "loss" in logs:
            elapsed = time.perf_counter() - self.begun
            rate = sum(self.job.together.all(self.job.collate.tokens - self.tokens)) / elapsed
            step, memory = self.state.global_step, self.peak.read()
            self.progress.step(step, logs["loss"], logs["learning_rate"], rate, memory)


class _Control(TrainerCallback):
    """Starts the clock and lets Ctrl-C end the run with a checkpoint."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.trainer: PlannedTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        t.seconds = max((log.get("seconds", 0.0) for log in state.log_history), default=0.0)
        t.begun, t.tokens = time.perf_counter(), t.job.collate.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        together = self.trainer.job.together
        if together.size > 1 and not control.should_log:
            return  # all stop after one step: they ask each other where they wait for each other anyway
        self.interrupt.requested = any(together.all(self.interrupt.requested))
        if self.interrupt.requested:
            control.should_log = control.should_save = control.should_training_stop = True


def check_finite(loss: float, method: str, rate: float) -> None:
    """Raise a CliError for a held-out loss that is no number: what was trained is lost."""
    if not math.isfinite(loss):
        raise CliError(
            f"{method}: the held-out loss is {loss}: training has diverged; lower --lr, which is {rate:g}"
        )


def train(
    method: str, tuned: Tuned, job: Job, folder: Path, resume: Path | None, interrupt: Interrupt
) -> Outcome:
    """Train ``tuned.model`` in place; checkpoints go to ``folder``."""
    o = job.options
    model: Any = tuned.model
    use_cache = model.config.use_cache  # Trainer turns it off
    if o.checkpointing:
        _switch_checkpointing(model, True)
    blocks = tuned.blocks if o.compile else []
    for block in blocks:
        block.compile()
    # Blocks share one limit of compilations, beyond which they run eagerly: of shapes, of the first and the profiled.
    variants = torch._dynamo.config.patch(recompile_limit=64) if blocks else nullcontext()
    peak = Peak(job.device)
    control = _Control(interrupt)
    with training_progress(job.console, method, job.steps) as progress, variants:
        trainer = PlannedTrainer(
            method,
            job,
            progress,
            peak,
            model=model,
            args=_arguments(method, job, folder),
            optimizer_cls_and_kwargs=_optimizer(method, tuned, job),
            callbacks=[*tuned.callbacks, control],
        )
        trainer.remove_callback(PrinterCallback)
        control.trainer = trainer
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.config.use_cache = use_cache
    for block in blocks:
        block._compiled_call_impl = None
    if blocks:
        torch.compiler.reset()  # the next method has the whole limit, and no shapes that are known already
    if o.checkpointing:
        _switch_checkpointing(model, False)
    logs = trainer.state.log_history
    return Outcome(
        train=[
            {"step": log["step"], "loss": log["loss"], "lr": log["learning_rate"]}
            for log in logs
            if math.isfinite(log.get("loss", math.nan))  # fp16 skips a step that overflows
        ],
        held_out=[{"step": g["step"], "loss": g["eval_loss"]} for g in logs if "eval_loss" in g],
        seconds=max(log.get("seconds", 0.0) for log in logs),
        peak=max(job.together.all(peak.read())),
        stopped=interrupt.requested,
    )


def _optimizer(method: str, tuned: Tuned, job: Job) -> tuple[type[AdamW], dict[str, Any]] | None:
    """For subnets in bf16, one that rounds stochastically; None: Trainer's own, which is torch's AdamW."""
    if tuned.losia is None or job.options.subnet_dtype is None:
        return None
    return AdamW, {"lr": job.options.lr[method], "seed": job.options.seed}


def _arguments(method: str, job: Job, folder: Path) -> TrainingArguments:
    o = job.options
    scheduler, settings = SCHEDULERS[o.scheduler]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=job.steps,
        per_device_train_batch_size=o.batch_size,
        gradient_accumulation_steps=o.accumulation,
        learning_rate=o.lr[method],
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=settings,
        warmup_steps=round(o.warmup * job.steps) if o.warmup < 1 else int(o.warmup),
        weight_decay=o.weight_decay,
        max_grad_norm=o.clip,
        seed=o.seed,
        bf16=job.precision == "bf16" and method in ("lora", "full"),
        fp16=job.precision == "fp16",
        use_cpu=job.device.type == "cpu",
        logging_steps=max(1, job.steps // 500),
        logging_nan_inf_filter=False,  # it would show 0 for what is no number
        eval_strategy="steps",
        eval_steps=o.eval_steps or max(1, job.steps // 10),
        save_strategy="steps" if o.save_steps else "no",
        save_steps=o.save_steps or 1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer copies the model to every GPU
    return arguments


def _switch_checkpointing(model: Any, on: bool) -> None:
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else ""
    name = name or "gradient_checkpointing"  # transformers before 5.18
    if on:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()
