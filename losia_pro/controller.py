"""``attach`` and the ``Losia`` controller: when subnets are profiled, moved, rewarmed, written back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import base, checkpoint, decay, delta, rewarm, sharded
from .calibrate import calibrate
from .config import LosiaConfig
from .convert import convert, restore, take_places
from .discover import check_weights, find_targets, subnet_sizes
from .distributed import Ranks, allow_broadcast, keep_from_broadcast, ranks_of, start_digest
from .inputs import find_shared_inputs
from .linear import SubnetLinear
from .optimizer import check_optimizer, innermost, is_rehearsal, warn_of_idle
from .profile import Profile
from .reselect import Reselection, lost_to_rounding, reselect
from .schedule import Schedule

if TYPE_CHECKING:  # PyTorch built without torch.distributed lacks the name
    from torch.distributed import ProcessGroup


def attach(model: nn.Module, config: LosiaConfig | None = None, *, example: Any = None) -> Losia:
    """Swap the targeted linears of ``model`` for ``SubnetLinear``, in place, and freeze the rest.

    Args:
        model: any module whose weights are loaded; its repeated blocks become the schedule's groups.
        config: sizes and schedule; ``LosiaConfig()`` if None.
        example: for ``share_inputs``, what the model is called with: a mapping, or a sequence of arguments;
            a Hugging Face model brings its own.

    Returns:
        The controller: an optimizer takes ``losia.parameters()``, then ``losia.bind(optimizer)``.

    Raises:
        ValueError: nothing to adapt, a pattern that matches nothing, a layer too small to slice, weights
            on the meta device or shared between targets, an attached model. The model is then untouched.
    """
    return Losia(model, config or LosiaConfig(), example)


class Losia:
    """Controls the subnets of an attached model.

    Attributes:
        modules: the adapted linears by name.
        groups: their names, one list a group of the schedule.
        sets: their names, one list for those that share their inputs; one that shares none is alone.
        schedule: who is profiled and moved when.
        step: how many optimizer steps have been made.
        history: every re-selection so far.
    """

    def __init__(self, model: nn.Module, config: LosiaConfig, example: Any = None) -> None:
        targets = find_targets(model, config)
        linears = targets.linears
        check_weights(linears, config)
        sizes = subnet_sizes(linears, targets.head, config)
        shared = find_shared_inputs(model, targets, example) if config.share_inputs else []

        self.model, self.config = model, config
        self.groups = targets.groups
        self.sets = shared + [[n] for n in linears if not any(n in names for names in shared)]
        self.schedule = Schedule(len(self.groups), config.period, config.schedule == "sync")
        self.step = 0
        self.history: list[Reselection] = []
        self.base_digest = delta.base_of(linears)
        self.start_digest = start_digest(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: Any = None
        self._handles: list[Any] = []
        self._skip = self._detached = False
        self._ranks: Ranks | None = None
        self._before: rewarm.Before = []
        self._last: dict[str, Tensor] = {}
        self._calibrated = config.init == "random"
        self._required_grad = {n: p.requires_grad for n, p in model.named_parameters()}

        model.requires_grad_(False)
        self.modules, self._swaps = convert(linears, sizes, self.sets, config)
        take_places(model, self._swaps)
        keep_from_broadcast(model, self.modules.values())
        base.record(self, self.modules)
        self._anchors = decay.Anchors()

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: every subnet, and the biases if ``train_bias``, frozen by the loop or not."""
        own = ((m, p) for m in self.modules.values() for p in m.parameters())
        return [p for m, p in own if p is m.subnet or (self.config.train_bias and p is m.bias)]

    def _subnets(self) -> dict[str, nn.Parameter]:
        return {n: m.subnet for n, m in self.modules.items()}

    def group_modules(self, group: int) -> dict[str, SubnetLinear]:
        """The linears of one group by name."""
        return {n: self.modules[n] for n in self.groups[group]}

    # --- training -----------------------------------------------------------------------------------

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: Any = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Hook write-back, profiling, re-selection, state reset and rewarming into ``optimizer.step()``.

        Args:
            optimizer: any ``torch.optim`` optimizer but LBFGS that holds every subnet, or accelerate's wrapper
                of it. Binding another one replaces the last.
            scaler: the ``torch.amp.GradScaler`` in use, if any: importance needs gradients unscaled. Default: the
                wrapper's.
            process_group: the processes that train this model together, by ``DistributedDataParallel``;
                default: all of them, once ``torch.distributed`` is initialised. Each calls ``bind``.

        Raises:
            TypeError: not a ``torch.optim.Optimizer``.
            ValueError: LBFGS, or a schedule-free optimizer; subnets missing from it, or in bf16 and rounded to nearest
                by it; one without learning rates, with ``base_decay``; ``init="calibrate"`` not done yet.
            RuntimeError: ranks that differ in weights, subnets, settings or step; so does a later step. A detached one.
        """
        base.refuse_detached(self)
        scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        optimizer = innermost(optimizer)
        check_optimizer(optimizer, self._subnets(), self.config.base_decay)
        if not self._calibrated:
            raise ValueError(
                'config.init is "calibrate": call losia.calibrate(batches) before bind()'
            )
        sharded.settle(self.model)
        ranks = ranks_of(self, process_group)
        self._unbind()
        self._optimizer, self._scaler = optimizer, scaler
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
        ]
        self._set_profiled()
        self._ranks = ranks
        if self._ranks:
            self._handles.append(self.model.register_forward_pre_hook(self._ranks.refuse_join))
            self._ranks.check_start(self, "at bind()")

    def _unbind(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not bound: its optimizer's hooks are not copied, and cannot be pickled."""
        return {**vars(self), "_handles": [], "_optimizer": None, "_scaler": None, "_ranks": None}

    def _set_profiled(self) -> None:
        """Give the groups profiled at the present step their buffers, and free all others'."""
        profiled = self.schedule.profiled(self.step)
        for group in range(len(self.groups)):
            for module in self.group_modules(group).values():
                if group not in profiled:
                    module.profile = None
                elif module.profile is None:
                    module.profile = Profile(module, self.config)

    def _profiles(self) -> Iterable[Profile]:
        return (m.profile for m in self.modules.values() if isinstance(m.profile, Profile))

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler
        base.refuse(self)
        sharded.settle(self.model)
        check_optimizer(optimizer, self._subnets())  # fully_shard() puts others in their place
        overflow = found_inf is not None and bool(found_inf)
        self._skip = overflow or is_rehearsal(optimizer, self._ranks.any if self._ranks else bool)
        base.warn_of_loaded(self)
        self._last = {
            n: m.subnet.detach().clone()
            for group in self.schedule.reselected(self.step)
            for n, m in self.group_modules(group).items()
        }
        self._before = rewarm.before(self)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.config.base_decay and not self._skip:
            decay.pull(self, optimizer)
        rewarm.after(self, self._before)
        self._before = []
        # Here and not before the step: a closure's backward comes in between. The dense weights that
        # importance reads are still those of the forward.
        for profile in self._profiles():
            if self._skip:
                profile.discard()
            else:
                scale = 1.0 if self._scaler is None else 1.0 / self._scaler.get_scale()
                profile.update(scale, self._ranks.mean_ if self._ranks else None)
        lost = {n: lost_to_rounding(self.modules[n], before) for n, before in self._last.items()}
        self.write_back()
        if self._skip:
            return
        if self._ranks:
            self._ranks.check_step(self)
        if self.step == 0:
            warn_of_idle(self._subnets())
        moved = self.schedule.reselected(self.step)
        self.step += 1
        for group in moved:
            reselect(self, group, lost)
        self._set_profiled()

    def write_back(self) -> None:
        """Write every subnet into its dense weight, but not after ``detach``. Idempotent; a bound step does it."""
        base.refuse(self)
        if self._detached:
            return
        sharded.settle(self.model)
        in_parts = any(sharded.is_sharded(m.subnet) for m in self.modules.values())
        launches = self.groups if in_parts else [list(self.modules)]  # what is in parts is gathered
        for names in launches:
            sharded.write_together([self.modules[n] for n in names], self.config.impl)

    def touched(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Every place, as ``(out_idx, in_idx)``, where one linear may differ from the base model."""
        return self.modules[name].touched.blocks

    def base(self) -> AbstractContextManager[None]:
        """The base model, for as long as a ``with`` block lasts; called under ``torch.no_grad()`` within it.

        The base's values of all that may have been changed, biases too, are put in place, and after it the
        tuned ones, bit for bit both ways; a graph from before the block is good again after it. Kept for this,
        on the CPU: each entry that was ever in a subnet, once, in the weight's dtype, and 8 bytes a row and a
        column of each place; 3/32 of the adapted weights by default, until a subnet moves.

        Raises, within the block:
            RuntimeError: a forward that would train, an optimizer's step, saving, loading or ``detach``.
        """
        return base.BaseValues(self)

    def calibrate(
        self,
        batches: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        groups_at_once: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Choose the first subnets by importance over a few batches, one importance update a batch.

        Args:
            batches: mappings passed as ``model(**batch)``, or anything ``loss_fn`` takes.
            loss_fn: ``(model, batch) -> scalar``; default ``model(**batch).loss``.
            groups_at_once: how many groups to profile in one pass over the batches (two buffers the
                size of their weights each); default all.
            process_group: as ``bind``'s; each process brings its own part of every batch.

        Raises:
            ValueError: no batches, or no groups at once.
            RuntimeError: training has begun; ranks that differ.
        """
        calibrate(self, batches, loss_fn, groups_at_once, process_group)

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run that the model's and the optimizer's state dicts do not hold.

        Tensors and plain values only, so ``torch.load(..., weights_only=True)`` reads it. Take it between
        optimizer steps: gradients that wait for a step are not part of it. With FSDP2 every process takes it, and
        ``torch.distributed.checkpoint`` saves and loads the controller as it is.
        """
        return checkpoint.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run exactly. With the model's and the optimizer's own state, in any order.

        Raises:
            ValueError: another version, other modules, settings or sizes; nothing has changed then.
        """
        checkpoint.restore(self, state)

    def save_delta(self, path: str | os.PathLike[str]) -> None:
        """Write what training changed, as absolute values, to a safetensors file with a JSON header.

        ``losia_pro.load_delta(base_model, path)`` applies it. The file appears whole or not at all. With FSDP2
        every process takes part, and the first one writes.

        Raises:
            RuntimeError: weights that were loaded after ``attach``, and are not the base's.
        """
        self.write_back()
        delta.save(path, self)

    def detach(self) -> nn.Module:
        """Put the plain ``nn.Linear`` back with the tuned weights in place; returns the model.

        Hooks are removed and every parameter's ``requires_grad`` is as it was before ``attach``. Twice is as once.

        Raises:
            TypeError: a model that FSDP2 shards: its modules stay what they were at ``fully_shard``.
        """
        if self._detached:
            return self.model
        sharded.refuse_detach(self.modules.values())
        self.write_back()
        self._unbind()
        for m in self.modules.values():
            m.profile = None
        allow_broadcast(self.model, self.modules.values())
        restore(self.model, self._swaps)
        self._detached = True
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
            parameter.grad = None
        return self.model
