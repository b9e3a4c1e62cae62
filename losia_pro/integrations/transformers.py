"""Hugging Face ``Trainer``: its callback, and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..controller import Losia
from ..linear import SubnetLinear
from ..optimizer import innermost

KEY = "losia"  # of the controller's state within the optimizer's, or the scheduler's
CONVERSIONS = "_weight_conversions"  # of a model: what to rename in files, a list


class OwnNames(TrainerCallback):
    """Lets ``Trainer`` write checkpoints by the model's own names, until training ends.

    transformers saves experts, and what else it has renamed, by the names of files on the Hub, and ``Trainer`` does not
    translate those when it resumes: it would go on from the base's values (huggingface/transformers issue 48805).
    """

    _before: dict[str, Any] | None = None  # the model's list or that it had none, to put back

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        held = vars(kwargs["model"])
        if held.get(CONVERSIONS) != []:
            self._before = {k: v for k, v in held.items() if k == CONVERSIONS}
            held[CONVERSIONS] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._before is not None:
            held = vars(kwargs["model"])
            del held[CONVERSIONS]
            held.update(self._before)
            self._before = None


class LosiaCallback(OwnNames):
    """Lets ``Trainer`` train the subnets of an attached model::

        losia = losia_pro.attach(model, config)
        Trainer(model, args, ..., callbacks=[LosiaCallback(losia)])

    A model of PEFT brings its own, also one that TRL makes from ``peft_config``::

        SFTTrainer(model, ..., peft_config=losia_pro.peft.LosiaConfig(...), callbacks=[LosiaCallback()])

    It binds the optimizer when training begins. Each checkpoint carries ``losia.state_dict()`` inside its
    ``optimizer.pt``, so that a run resumed from it (``trainer.train(resume_from_checkpoint=...)``, of any
    folder) is bitwise the run that was not stopped. Started by ``torchrun`` or ``accelerate launch``, several
    processes train one model through ``DistributedDataParallel``, or, with ``TrainingArguments(fsdp=True)``,
    through FSDP2; a checkpoint's ``scheduler.pt`` carries the state then, and ``trainer.save_model(folder)`` saves
    the tuned model.

    Into Trainer's logs go ``losia_rewarm``, the factor of the learning rate at this step, a mean over the groups
    (1: none is rewarming); and after re-selections ``losia_moved``, how many linears were moved since the last log,
    with the means over them of ``losia_score_kept``, ``losia_overlap`` and ``losia_lost_to_rounding``; see
    ``losia.history`` for each. The trackers that ``report_to`` names are called before the callbacks that a
    ``Trainer`` is given; for them, put this one first::

        trainer = Trainer(model, args, ...)
        LosiaCallback(losia).add_to(trainer)

    Args:
        losia: the controller; None: the model's own.

    Raises, when training begins, or where that is known when the ``Trainer`` is made:
        ValueError: a model that is not attached, or under FSDP2 one of PEFT; an optimizer that lacks the subnets; a
            checkpoint without or with another LoSiA state; ``torch.nn.DataParallel``, FSDP version 1, DeepSpeed or
            another engine that shards the model; an output head that the loss goes around, as TRL's does; with
            FSDP2, a scheduler that does not save its attributes.
        RuntimeError: processes that differ, in the weights they start from say.
    """

    def __init__(self, losia: Losia | None = None) -> None:
        self._given, self._losia = losia, losia
        self._handle: Any = None
        self._carrier: Any = None
        self._logged = 0

    def add_to(self, trainer: Trainer) -> None:
        """Become the first of a trainer's callbacks, so that its trackers see what this one logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    @property
    def losia(self) -> Losia:
        """The controller of the model that is trained."""
        if self._losia is None:
            raise ValueError(
                "the model is not attached: give the trainer peft_config=losia_pro.peft.LosiaConfig(...), or "
                "LosiaCallback what losia_pro.attach(model) returns"
            )
        return self._losia

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_other_engines(args, kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_other_engines(args, kwargs.get("model"))
        self._losia = self._given or getattr(kwargs["model"], "losia", None)
        _refuse_another_model(self.losia, kwargs["model"])
        optimizer = innermost(kwargs["optimizer"])
        self._carrier = kwargs["lr_scheduler"] if _is_sharded(args) else None
        saved = optimizer.state.pop(KEY, None)
        if self._carrier is not None:
            saved = vars(self._carrier).pop(KEY, None)
            check_carrier(self._carrier)
        if saved is not None:
            self.losia.load_state_dict(saved)
        elif state.global_step > 0:
            raise ValueError(
                f"the checkpoint of step {state.global_step} holds no LoSiA state: it was not saved with "
                "LosiaCallback (or with save_only_model=True); start anew"
            )
        self.losia.bind(kwargs["optimizer"])
        super().on_train_begin(args, state, control, **kwargs)
        if self._handle is not None:
            self._handle.remove()
        self._handle = optimizer.register_state_dict_post_hook(self._add_state)
        self._logged = len(self.losia.history)
        self._check_head = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._check_head:
            self._check_head = False
            _refuse_a_head_without_gradient(self.losia.model)

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """An optimizer's ``load_state_dict`` keeps entries of ``state`` that are not a parameter's, which
        is how the controller's state is back before ``on_train_begin``, wherever the checkpoint lies.

        ``torch.distributed.checkpoint`` takes none but a parameter's. A scheduler's attributes are its state: with
        FSDP2 every process comes here, and the first saves the scheduler right after the optimizer.
        """
        if self._carrier is not None:
            vars(self._carrier)[KEY] = self.losia.state_dict()
        else:
            state_dict["state"] = {**state_dict["state"], KEY: self.losia.state_dict()}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._carrier is not None:
            vars(self._carrier).pop(KEY, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._losia is None:  # evaluated before it is trained
            return
        losia, values = self._losia, dict[str, float]()
        if losia.config.period is not None and losia.config.rewarm and losia.step:
            groups = range(len(losia.groups))
            factors = [losia.schedule.rewarm(losia.step - 1, group) for group in groups]
            values["losia_rewarm"] = sum(factors) / len(factors)
        moved = losia.history[self._logged :]
        self._logged += len(moved)
        if moved:
            values["losia_moved"] = len(moved)
            for name in ("score_kept", "overlap", "lost_to_rounding"):
                values[f"losia_{name}"] = sum(getattr(r, name) for r in moved) / len(moved)
        if logs is not None:
            logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Trainer's latest checkpoint in a folder that was written to its end, whatever stopped the run; None if there
    is none. For ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))``.

    ``resume_from_checkpoint=True`` takes the latest of all, which a killed process leaves half-written.
    """
    found = {}
    for checkpoint in Path(folder).glob("checkpoint-*"):
        number = checkpoint.name.rpartition("-")[2]
        if number.isdigit() and _is_json(checkpoint / "trainer_state.json"):
            found[int(number)] = checkpoint
    return found[max(found)] if found else None


def _is_json(path: Path) -> bool:
    """``trainer_state.json`` is the last file of a checkpoint: whole if the checkpoint is."""
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def _refuse_another_model(losia: Losia, model: nn.Module) -> None:
    held = {id(m) for m in model.modules()}
    if not any(id(m) in held for m in losia.modules.values()):
        raise ValueError(
            "the trainer's model is not the one that LosiaCallback's controller adapts, or that one was detached; give "
            "LosiaCallback what losia_pro.attach(model) returns for this model, and a trainer with model_init a "
            "model_init that returns PEFT models, and LosiaCallback()"
        )


def _refuse_a_head_without_gradient(model: nn.Module) -> None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, SubnetLinear) and head.subnet.requires_grad and head.subnet.grad is None:
        raise ValueError(
            "the loss is computed from the output head's weight and not by calling it, so that its subnet gets no "
            "gradient (TRL does so); use output_factor=0"
        )


def _refuse_other_engines(args: TrainingArguments, model: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"torch.nn.DataParallel, which Trainer uses for {args.n_gpu} GPUs in one process, is not supported; "
            f"start a process for each (torchrun --nproc_per_node {args.n_gpu}), or set CUDA_VISIBLE_DEVICES=0"
        )
    if _is_sharded(args):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "PEFT's adapters are not saved under FSDP2; give LosiaCallback what losia_pro.attach(model) returns, "
                "or train through DistributedDataParallel"
            )
        return
    engine = _engine(args)
    if engine == "FSDP":
        raise ValueError(
            'FSDP version 1 is not supported; use FSDP2: fsdp_config={"version": 2} in TrainingArguments, or '
            "accelerate launch --fsdp_version 2"
        )
    if engine != "NO" and not engine.startswith("MULTI_"):  # MULTI_GPU, MULTI_CPU, ...
        raise ValueError(
            f"{engine} is not supported; several processes train through DistributedDataParallel or FSDP2: "
            "leave DeepSpeed and the like out of TrainingArguments and of accelerate's config"
        )


def _engine(args: TrainingArguments) -> str:
    """accelerate's name of what trains on several devices."""
    return args.distributed_state.distributed_type.name if args.distributed_state else "NO"


def _is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP2 trains the model."""
    return _engine(args) == "FSDP" and AcceleratorState().is_fsdp2


def check_carrier(scheduler: Any) -> None:
    """Refuse a scheduler whose state dict would not hold what is added to its attributes."""
    vars(scheduler)[KEY] = True
    if KEY not in scheduler.state_dict():
        raise ValueError(
            f"with FSDP2, LoSiA's state is saved among the scheduler's attributes, and {type(scheduler).__name__} does "
            "not save those; use one of torch.optim.lr_scheduler"
        )
    del vars(scheduler)[KEY]
