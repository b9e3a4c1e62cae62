"""What a profiled layer accumulates: smoothed importance and uncertainty of every weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from . import ops, reference, sharded, torch_ops
from .config import LosiaConfig
from .localize import localize_together
from .selection import select_together

if TYPE_CHECKING:
    from .linear import SubnetLinear


class Profile:
    """Importance of one linear's weights, from its full gradients, over one slot.

    The backward hands over ``dy`` ``(T, out)`` and ``x`` ``(T, in)``; the product ``dy^T x`` is formed when
    the optimizer steps, together with the update of importance and uncertainty, so that importance is a
    function of the whole step's gradient however the batch was split. Earlier micro-batches of the step
    are summed into ``grad``, which exists only while there are any.

    A compiled backward cannot hand over anything but gradients. There the product is the gradient of ``full``, a
    leaf of the weight's shape that takes no memory, and autograd sums it up.

    ``importance`` and ``uncertainty`` are sharded as the weight is; ``checksum`` is then a sum over the bits of all
    the gradients that they come from, the same on every rank unless one missed a reduction.
    """

    def __init__(self, module: SubnetLinear, config: LosiaConfig) -> None:
        self.module, self.config = module, config
        dtype = importance_dtype(module.weight.dtype)
        self.subnet = module.subnet  # the trained one: in a backward, the module's may be gathered
        self.importance = torch.zeros_like(
            module.weight,
            dtype=dtype,
            device=module.out_idx.device,
            requires_grad=False,
            memory_format=torch.contiguous_format,
        )
        self.uncertainty = torch.zeros_like(self.importance)
        self.checksum = torch.zeros((), dtype=torch.int64, device=self.importance.device)
        self._reduced = {"yet": True}  # whether what was added so far is in subnet.grad
        trains = self.subnet.requires_grad  # or the loop has frozen it
        if trains and sharded.is_sharded(self.subnet):  # FSDP2 may put it there in a later backward
            self._reduced["yet"] = False
            reduced = self._reduced
            hook = self.subnet.register_post_accumulate_grad_hook(
                lambda _: reduced.update(yet=True)
            )
            weakref.finalize(self, hook.remove)
        self.pending: tuple[Tensor, Tensor] | None = None
        self._backward = -1
        self._version = 0  # of subnet.grad, when the last backward began
        self.full = self._leaf()
        leaves = (self.full, self.subnet) if trains else (self.full,)
        _at_gradients(self, *leaves)

    def _leaf(self) -> Tensor:
        zero = torch.zeros((), dtype=self._compact(), device=self.importance.device)
        return zero.expand(self.module.weight.shape).requires_grad_()

    @property
    def grad(self) -> Tensor | None:
        """The sum of the step's micro-batches, less those in ``pending``: ``(out, in)``, in fp32 or fp64."""
        return self.full.grad

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        self.full.grad = grad

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Take one micro-batch's operands.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose replays would not come here.
        """
        if dy.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a profiled layer cannot be captured in a CUDA graph: capture the step with period=None, or use "
                'torch.compile(mode="reduce-overhead"), which handles profiled layers'
            )
        self.begin()
        if self.pending is not None:
            self._fold()
        self.pending = dy.detach(), x.detach()

    def begin(self) -> None:
        """A backward reaches this layer; before its gradients are added to the last ones.

        What a discarded step left behind (an overflow under ``GradScaler``, a ``zero_grad`` without a
        step) is dropped: a new backward that finds no gradient on the subnet, or one that was set to
        zero, starts a new step.
        """
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        self._backward, last = backward, self._version
        grad = self.subnet.grad
        self._version = 0 if grad is None else grad._version
        if grad is None:
            if self._reduced["yet"]:
                self.discard()
        elif self.grad is not None or self.pending is not None:
            if self.pending is not None:
                self._fold()
            if not sharded.is_sharded(self.subnet):
                self._drop_if_zeroed()
            elif self._version != last and self._reduced["yet"] and not sharded.whole(grad).any():
                self.discard()  # FSDP2 adds to it without a new version: the loop set it

    def _fold(self) -> None:
        assert self.pending is not None
        if self.grad is None:
            self.grad = torch_ops.product(*self.pending, self._compact())
        else:
            torch_ops.add_product_(self.grad, *self.pending)
        self.pending = None

    def _compact(self) -> torch.dtype:
        """The gradient's dtype, from the weight's own: in a backward, that may be cast."""
        return ops.compact_dtype(self.importance.dtype)

    def _whole_grad(self) -> Tensor:
        """All that was added, as one matrix; zeros if nothing was."""
        if self.pending is not None:
            self._fold()
        if self.grad is None:
            shape, device = self.module.weight.shape, self.importance.device
            self.grad = torch.zeros(shape, dtype=self._compact(), device=device)
        return self.grad

    def _drop_if_zeroed(self) -> None:
        """Without a device sync: if ``subnet.grad`` is zero where the gradients kept here are not, it was
        set to zero since they came."""
        m = self.module
        assert self.grad is not None and self.subnet.grad is not None
        mine = self.grad.index_select(0, m.out_idx).index_select(1, m.in_idx)
        self.grad.masked_fill_(mine.any() & ~self.subnet.grad.any(), 0)

    def discard(self) -> None:
        """Forget the gradients of the present step."""
        self.grad = self.pending = None
        self._reduced["yet"] = not sharded.is_sharded(self.subnet)

    @torch.no_grad()
    def update(self, scale: float = 1.0, reduce: Callable[[Tensor], None] | None = None) -> None:
        """Close an optimizer step: fold its gradient, times ``scale``, into importance and uncertainty.

        ``reduce`` makes the whole batch's gradient of this process's, in place; zeros if it has none.
        """
        c, weight = self.config, self.module.weight
        importance, uncertainty = sharded.local(self.importance), sharded.local(self.uncertainty)
        own = sharded.local(weight).to(importance.device)
        grad = self.grad
        if reduce is not None or sharded.is_sharded(weight):
            grad = self._whole_grad()
            if reduce is not None:
                reduce(grad)
        if grad is not None and sharded.is_sharded(weight):
            self.checksum += grad.view(torch.int32).sum(dtype=torch.int64)
            grad = grad[sharded.rows(weight)]
        dy, x = self.pending or (own.new_empty(0, size) for size in own.shape)
        if own.numel():
            torch.ops.losia_pro.importance_update_(
                importance, uncertainty, own, dy, x, grad,
                c.beta1, c.beta2, c.importance, scale=scale, impl=c.impl,
            )  # fmt: skip
        self.discard()

    def score(self) -> Tensor:
        """``s = I U`` (or what ``config.score`` says), ``(out, in)``, in fp32 (fp64 for fp64 weights); whole."""
        dtype = self._compact()
        importance, uncertainty = self.importance.to(dtype), self.uncertainty.to(dtype)
        return sharded.whole(reference.score(importance, uncertainty, self.config.score))

    def follow(self) -> None:
        """Move to the device and dtype that the layer's weight has now."""
        device, dtype = self.module.out_idx.device, importance_dtype(self.module.weight.dtype)
        self.importance = self.importance.to(device, dtype)
        self.uncertainty = self.uncertainty.to(device, dtype)
        self.discard()
        self.full = self._leaf()
        _at_gradients(self, self.full)


def _at_gradients(profile: Profile, *leaves: Tensor) -> None:
    """Let each backward begin at the first of these gradients, for as long as the profile lives."""
    profile_of = weakref.ref(profile)

    @unserializable_hook  # type: ignore[untyped-decorator]
    def begin(grad: Tensor) -> None:
        profile = profile_of()
        if profile is not None:
            profile.begin()

    for leaf in leaves:
        weakref.finalize(profile, leaf.register_hook(begin).remove)


def importance_dtype(weight: torch.dtype) -> torch.dtype:
    """bf16 for weights of two bytes, else the compact dtype.

    The buffers and their traffic are half of fp32's. Rounding moves a smoothed value by at most
    ``2^-9 / (1 - beta)`` of it, 1.3 % at 0.85, and the sums over rows and columns average that out.
    """
    return torch.bfloat16 if weight.itemsize == 2 else ops.compact_dtype(weight)


class Move(NamedTuple):
    """``score_kept``: share of the linear's whole score that its new subnet holds; ``overlap``: share of the new
    subnet's entries that were in the last one."""

    score_kept: float
    overlap: float


def relocate(modules: Sequence[SubnetLinear], config: LosiaConfig) -> list[Move] | None:
    """Move the subnets of profiled linears that share their inputs (one that shares none is alone) to where their
    score is, and end their profiles.

    Returns:
        A move for each; None, with nothing moved, if there is no score at all.
    """
    scores = []
    for module in modules:
        assert isinstance(module.profile, Profile)
        scores.append(module.profile.score())
        module.profile = None
    totals = [float(score.sum(dtype=torch.float64)) for score in scores]
    if not any(totals):
        return None
    last = [(m.out_idx.clone(), m.in_idx.clone()) for m in modules]
    n_out, n_in = [m.subnet.shape[0] for m in modules], modules[0].subnet.shape[1]
    group = config.group(modules[0].in_features, n_in == modules[0].in_features)
    out_idx, in_idx = localize_together(scores, n_out, n_in, config.strategy, group)
    select_together(modules, out_idx, in_idx)
    moves = []
    for module, score, total, (old_out, old_in) in zip(modules, scores, totals, last, strict=True):
        kept = float(score[module.out_idx][:, in_idx].sum(dtype=torch.float64))
        rows, columns = torch.isin(module.out_idx, old_out), torch.isin(in_idx, old_in)
        same = int(rows.sum()) * int(columns.sum())
        moves.append(Move(kept / total if total else 0.0, same / module.subnet.numel()))
    return moves
