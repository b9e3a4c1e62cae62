"""AdamW for subnets in bf16: what rounding to nearest would lose arrives on the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from .dispatch import function
from .rounding import key_of
from .sharded import is_sharded, local, rows


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``, with stochastic rounding of bf16 parameters and of their state.

    A bf16 parameter ``w`` has spacing ``u``, between ``2^-8 |w|`` and ``2^-7 |w|``; rounded to nearest, it stays where
    it is under every update below ``u / 2``, however many come. Its moments are in bf16 as well, and at
    ``beta2 = 0.999`` the second one would never fall, for ``0.001 v`` is less than half its spacing. Here the step is
    computed in fp32, as ``torch.optim.AdamW`` does it, and each result is rounded up or down with the probabilities
    that make its expectation exact (``losia_pro/rounding.py``). After ``n`` steps the roundings' sum has expectation 0
    and a standard deviation of at most ``sqrt(n) u / 2``, where nearest can lose the whole way. The noise of the second
    moment comes to rest at a standard deviation of ``sqrt(u / 2 v)``, at most 6 % of ``v`` and so 3 % of a step.

    Other dtypes are ``torch.optim.AdamW``'s, bit for bit.

    The random bits are a hash of ``seed``, the parameter's place among all, its number of steps, and the entry. They
    take no state and no global generator: a resumed run goes on bit for bit, and data-parallel ranks agree; FSDP2's
    shards have bits of their own, so a run on another number of ranks differs by its roundings. ``seed`` is kept in
    ``param_groups``, so a checkpoint brings its own.

    Memory of a bf16 subnet: 2 bytes an entry each for parameter, gradient and two moments, 8 where fp32 takes 16. For
    LLaMA-2 7B at ``p = 1/8``, 101 M entries, 0.8 GB less. On a GPU all of a group's bf16 tensors take one launch;
    elsewhere fp32 copies of one tensor at a time.

    Args:
        params, lr, betas, eps, weight_decay, maximize: ``torch.optim.AdamW``'s.
        foreach, fused: the same, for parameters of other dtypes.
        seed: of the random bits.

    Raises:
        ValueError: what ``torch.optim.AdamW`` refuses; ``amsgrad``, ``capturable`` or ``differentiable`` in a group,
            of a checkpoint's too.
    """

    bf16_stochastic_round = True  # as torchao's optimizers say it

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused
        )
        self.defaults["seed"] = seed
        for group in self.param_groups:
            group.setdefault("seed", seed)
        self._step_supports_amp_scaling = False  # a GradScaler unscales and skips by itself

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # torch.optim.AdamW's have no seed
            group.setdefault("seed", self.defaults.get("seed", 0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = 0
        for group in self.param_groups:
            trained = [(before + k, p) for k, p in enumerate(group["params"]) if p.grad is not None]
            before += len(group["params"])
            self._step_bf16(group, [(k, p) for k, p in trained if p.dtype == torch.bfloat16])
            self._step_others(group, [p for _, p in trained if p.dtype != torch.bfloat16])
        return loss

    def _state(self, p: Tensor, step: torch.device | str) -> dict[str, Tensor]:
        """A parameter's state, as ``torch.optim.AdamW`` has it."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=step)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _step_others(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        states = [self._state(p, p.device if group["fused"] else "cpu") for p in params]
        moments, squares, steps = _columns(states)
        adamw(
            params, _grads(params), moments, squares, [], steps, foreach=group["foreach"],
            fused=group["fused"], amsgrad=False, lr=group["lr"], **_constants(group),
        )  # fmt: skip

    def _step_bf16(self, group: dict[str, Any], params: list[tuple[int, Tensor]]) -> None:
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for k, p in params:
            by_device.setdefault(p.device, []).append((k, p))
        for numbered in by_device.values():
            own = [p for _, p in numbered]
            states = [self._state(p, "cpu") for p in own]
            steps = []
            for state in states:
                state["step"] = state["step"].cpu() + 1  # loaded with fused, it is on the device
                steps.append(int(state["step"]))
            places = [(k, rows(p).start) if is_sharded(p) else (k,) for k, p in numbered]
            keys = [key_of(group["seed"], *k, t) for k, t in zip(places, steps, strict=True)]
            moments, squares, _ = _columns(states)
            grads = [g.contiguous() for g in _grads(own)]
            parts = [[local(t) for t in ts] for ts in (own, grads, moments, squares)]
            constants = {"lr": float(group["lr"]), **_constants(group)}
            function("adamw_", parts[0][0], None)(*parts, steps, keys, **constants)
            increment_version(parts[0])  # kernels do not; layers see by it what is not written back


def _check(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "capturable", "differentiable"):
        if group.get(name):
            raise ValueError(
                f"losia_pro.optim.AdamW has no {name}; torch.optim.AdamW has, for fp32 subnets"
            )


def _grads(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _columns(states: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    moments, squares, steps = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step"))
    return moments, squares, steps


def _constants(group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    same = {name: group[name] for name in ("eps", "weight_decay", "maximize")}
    return {"beta1": beta1, "beta2": beta2, **same}
