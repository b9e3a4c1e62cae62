"""Hugging Face ``Trainer``: one callback."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..controller import Losia

KEY = "losia"  # of the controller's state within the optimizer's


class LosiaCallback(TrainerCallback):
    """Lets ``Trainer`` train the subnets of an attached model::

        losia = losia_pro.attach(model, config)
        Trainer(model, args, ..., callbacks=[LosiaCallback(losia)])

    It binds the optimizer when training begins. Each checkpoint carries ``losia.state_dict()`` inside its
    ``optimizer.pt``, so that a run resumed from it (``trainer.train(resume_from_checkpoint=...)``, of any
    folder) is bitwise the run that was not stopped. Re-selections appear in Trainer's logs as
    ``losia_moved`` (linears moved since the last log), ``losia_score_kept`` and ``losia_overlap`` (their
    means); see ``losia.history`` for each. Started by ``torchrun`` or ``accelerate launch``, several processes
    train one model through ``DistributedDataParallel``.

    Raises, when training begins:
        ValueError: the optimizer lacks the subnets; a checkpoint without or with another LoSiA state;
            ``torch.nn.DataParallel``, FSDP, DeepSpeed or another engine that shards the model.
        RuntimeError: processes that differ, in the weights they start from say.
    """

    def __init__(self, losia: Losia) -> None:
        self.losia = losia
        self._handle: Any = None
        self._logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_other_engines(args)
        wrapped = kwargs["optimizer"]
        optimizer: Optimizer = wrapped
        while hasattr(optimizer, "optimizer"):  # accelerate wraps it; hooks belong on the inner one
            optimizer = optimizer.optimizer
        saved = optimizer.state.pop(KEY, None)  # type: ignore[call-overload]
        if saved is not None:
            self.losia.load_state_dict(saved)
        elif state.global_step > 0:
            raise ValueError(
                f"the checkpoint of step {state.global_step} holds no LoSiA state: it was not saved with "
                "LosiaCallback (or with save_only_model=True); start anew"
            )
        self.losia.bind(optimizer, scaler=getattr(wrapped, "scaler", None))
        if self._handle is not None:
            self._handle.remove()
        self._handle = optimizer.register_state_dict_post_hook(self._add_state)
        self._logged = len(self.losia.history)

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """An optimizer's ``load_state_dict`` keeps entries of ``state`` that are not a parameter's, which
        is how the controller's state is back before ``on_train_begin``, wherever the checkpoint lies."""
        state_dict["state"] = {**state_dict["state"], KEY: self.losia.state_dict()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        moved = self.losia.history[self._logged :]
        if not moved:
            return
        self._logged += len(moved)
        values: dict[str, float] = {
            "losia_moved": len(moved),
            "losia_score_kept": sum(r.score_kept for r in moved) / len(moved),
            "losia_overlap": sum(r.overlap for r in moved) / len(moved),
        }
        if logs is not None:
            logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


def _refuse_other_engines(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"torch.nn.DataParallel, which Trainer uses for {args.n_gpu} GPUs in one process, is not supported; "
            f"start a process for each (torchrun --nproc_per_node {args.n_gpu}), or set CUDA_VISIBLE_DEVICES=0"
        )
    engine = args.distributed_state.distributed_type.name if args.distributed_state else "NO"
    if engine != "NO" and not engine.startswith("MULTI_"):  # MULTI_GPU, MULTI_CPU, ...
        raise ValueError(
            f"{engine} is not supported; several processes train through DistributedDataParallel: "
            "leave FSDP, DeepSpeed and the like out of TrainingArguments and of accelerate's config"
        )
