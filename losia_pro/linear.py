"""``SubnetLinear``: an ``nn.Linear`` of which a block of entries is trained."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sharded
from .base import Touched
from .config import subnet_size
from .functional import GradientSink, checked
from .guard import STEPPED, RecomputeGuard, watch_steps
from .ops import compact_dtype
from .selection import checked_idx, groups_of, random_neurons, select_together
from .shared import SharedInputs

_META = (
    "a SubnetLinear that was on the meta device does not know where its subnet is: load the weights into an nn.Linear, "
    "then convert it (with accelerate's FSDP2, set cpu_ram_efficient_loading=False)"
)


class SubnetLinear(nn.Linear):
    """A linear layer ``y = x W^T + b`` that trains the block ``W[out_idx][:, in_idx]``.

    ``weight`` ``(out, in)`` and ``bias`` are frozen and keep their state-dict keys: a checkpoint of this
    module is one of ``nn.Linear``. The trainable part is the parameter ``subnet`` ``(n_out, n_in)``, in
    fp32 (fp64 for fp64 weights; or bf16, see ``LosiaConfig``), holding the current values of those
    entries; ``out_idx`` and ``in_idx`` are sorted int64 buffers. Forward reads ``weight``, backward yields
    a gradient for ``subnet``; after an optimizer's step, ``write_back`` rounds ``subnet`` into ``weight``
    (``Losia.bind`` does it). Who sets ``weight`` in place, by other means than ``load_state_dict``, calls
    ``adopt_weight`` after it, or the next step puts the subnet's old values back.

    The output is ``F.linear``'s bit for bit, and where no gradient of ``subnet`` is asked for (``no_grad``,
    ``inference_mode``, a frozen ``subnet``) the call is ``F.linear``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``'s.
        rank_factor: ``p``; the subnet has ``floor(in p)`` inputs and ``floor(out p)`` outputs, at random.

    Raises:
        ValueError: the layer is too small to slice.
    """

    out_idx: Tensor
    in_idx: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank_factor: float = 1 / 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._make_subnet(*_sizes(self, rank_factor))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank_factor: float = 1 / 8,
        n_out: int | None = None,
        n_in: int | None = None,
        neuron_group: int = 1,
        shared: SharedInputs | None = None,
        subnet_dtype: torch.dtype | None = None,
        train_bias: bool = False,
        mode: str = "pro",
        impl: str | None = None,
        generator: torch.Generator | None = None,
    ) -> SubnetLinear:
        """Convert a linear; the result shares its ``weight`` and ``bias`` parameters and freezes them, and
        its hooks run.

        Args:
            linear: the layer, of any float dtype, on any device but meta.
            rank_factor, n_out, n_in: the subnet's size; ``n_out`` and ``n_in`` override the factor.
            neuron_group: neurons are chosen in aligned runs of this many, unless all are.
            shared: the inputs, for linears that have them in common.
            subnet_dtype: bf16 for a subnet in bf16, while the weight is; see ``LosiaConfig``.
            train_bias: leave the bias trainable, in its own dtype.
            mode: "pro" or "dense"; see ``subnet_linear``.
            impl: which kernels; see ``subnet_linear``.
            generator: a CPU generator for the random first subnet.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear)
        self._make_subnet(
            *_sizes(linear, rank_factor, n_out, n_in),
            generator,
            neuron_group,
            shared,
            subnet_dtype,
        )
        self.mode, self.impl = mode, impl
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        return self

    def _adopt(self, linear: nn.Linear) -> None:
        """Take over weight, bias, hooks and mode of the linear whose place this one takes."""
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name))
        self.__dict__.update({k: v for k, v in linear.__dict__.items() if "_hook" in k})
        self.train(linear.training)

    def _make_subnet(
        self,
        n_out: int,
        n_in: int,
        generator: torch.Generator | None = None,
        neuron_group: int = 1,
        shared: SharedInputs | None = None,
        subnet_dtype: torch.dtype | None = None,
    ) -> None:
        self.mode = "pro"
        self.impl: str | None = None
        self.shared = shared
        self.profile: GradientSink | None = None  # while it is profiled
        self.touched = Touched()  # the base's values, if a controller keeps them
        self._subnet_dtype = subnet_dtype  # as asked for
        self._own_rows: sharded.OwnRows | None = None  # under FSDP2
        self._guard = RecomputeGuard()
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        features = self.out_features, self.in_features
        self.groups = groups_of(features, (n_out, n_in), neuron_group)  # of out_idx and of in_idx
        out_idx = random_neurons(self.out_features, n_out, self.groups[0], generator)
        if shared is None:
            in_idx = random_neurons(self.in_features, n_in, self.groups[1], generator)
        else:
            in_idx = shared.on(self.weight.device)
        for name, idx in (("out_idx", out_idx), ("in_idx", in_idx)):
            self.register_buffer(name, idx.to(self.weight.device), persistent=False)
        self.subnet = nn.Parameter(self._block())
        watch_steps(self)
        self.mark_written()

    def _block(self) -> Tensor:
        """The subnet's entries as the dense weight holds them, in the compact dtype."""
        block = sharded.read(self.weight, (self.out_idx[:, None], self.in_idx))
        return block.to(self._compact_dtype())

    def _compact_dtype(self) -> torch.dtype:
        dtype = self.weight.dtype
        return dtype if dtype == self._subnet_dtype else compact_dtype(dtype)

    def forward(self, input: Tensor) -> Tensor:
        own: dict[str, Any] = self._parameters  # sooner than self.subnet
        indices: dict[str, Any] = self._buffers
        if not torch.compiler.is_compiling():
            self._guard.check()
            if own["subnet"]._version > self._written and not self.touched.swapped:
                self._check_written()
            if type(own["subnet"]) is not nn.Parameter:  # FSDP2's is whole here, and is one
                sharded.refuse_parallel(own["subnet"])
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        if self.touched.swapped and own["subnet"].requires_grad:
            self.touched.refuse_base()
        weight, bias = self._dense()
        return checked(
            input, weight, own["subnet"], indices["out_idx"], indices["in_idx"], bias,
            self.impl, self.mode, self.profile, self.groups, self.shared,
        )  # fmt: skip

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        """``weight`` and ``bias``, looked up fast; a subclass may keep them elsewhere."""
        own: dict[str, Any] = self._parameters
        return own["weight"], own.get("bias")

    def select(self, out_idx: Tensor, in_idx: Tensor) -> None:
        """Move the subnet to other entries: their values come from the dense weight, except that entries
        which stay keep their exact compact value. Not an optimizer's state: see ``Losia.bind``.

        Args:
            out_idx, in_idx: int64, distinct, on the weight's device, of the present sizes, in aligned runs
                where the layer has them; any order.

        Raises:
            ValueError: wrong size, dtype, device, range, duplicates or no runs; inputs that are shared with
                other linears (``select_together`` moves them all). Nothing has changed then.
        """
        if self.shared is not None and not torch.equal(
            checked_idx(self, "in_idx", in_idx), self.in_idx
        ):
            raise ValueError("in_idx is shared with other linears; select_together moves them all")
        select_together([self], [out_idx], in_idx)

    @torch.no_grad()
    def write_back(self) -> None:
        """``W[out_idx][:, in_idx] = subnet``, rounded to the weight's dtype. Idempotent."""
        self.touched.refuse_base()
        sharded.write_together([self], self.impl)

    def mark_written(self) -> None:
        """Remember that the dense weight holds the subnet as it is now."""
        self._written, self._weight_then = self.subnet._version, self.weight._version

    def _check_written(self) -> None:
        """Warn of a subnet that was set since it was written; not if the dense weight was set too, for
        ``DistributedDataParallel`` starts by setting all parameters, and they agree then."""
        if self._written == STEPPED or self.weight._version == self._weight_then:
            _warn_stale()
        else:
            self.mark_written()

    @torch.no_grad()
    def adopt_weight(self) -> None:
        """Take over a dense weight that was set from outside: compact values that round to what is there
        are kept, the others are read from it."""
        if self.subnet.is_meta and not self.weight.is_meta:
            raise RuntimeError(_META)
        block, subnet = self._block(), sharded.whole(self.subnet)
        same = subnet.to(self.weight.dtype) == block.to(self.weight.dtype)
        sharded.assign_(self.subnet, torch.where(same, subnet, block))
        self.mark_written()

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` that shares ``weight`` (subnet written back) and ``bias``."""
        self.write_back()
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard = RecomputeGuard()  # a copy has no forward yet
        self._written = self._weight_then = 0  # its tensors are new
        watch_steps(self)

    def extra_repr(self) -> str:
        n_out, n_in = self.subnet.shape
        return f"{super().extra_repr()}, subnet={n_out}x{n_in}, mode={self.mode}"

    # The state dict is nn.Linear's: the subnet is in the dense weight, its exact form in Losia's.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "subnet", None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        self.touched.refuse_base()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + "subnet" in missing:
            missing.remove(prefix + "subnet")
        self.touched.loaded = True
        self.adopt_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubnetLinear:
        """``.to(dtype)``, ``.to_empty()`` and the like convert the weight; the subnet stays exactly what
        and where it is, and follows to the weight's device."""
        subnet, grad = self.subnet.detach(), self.subnet.grad
        grad = None if grad is None else grad.detach()
        out_idx, in_idx = self.out_idx, self.in_idx
        super()._apply(fn, recurse)
        device, dtype = self.weight.device, self._compact_dtype()
        if subnet.is_meta and device.type != "meta":
            raise RuntimeError(_META)
        self.subnet.data = subnet.to(device, dtype)
        self.subnet.grad = None if grad is None else grad.to(device, dtype)
        self.out_idx = out_idx.to(device)
        self.in_idx = in_idx.to(device) if self.shared is None else self.shared.on(device)
        if self.profile is not None:
            self.profile.follow()
        return self


def _sizes(
    linear: nn.Linear, rank_factor: float, n_out: int | None = None, n_in: int | None = None
) -> tuple[int, int]:
    if not 0 < rank_factor <= 1:
        raise ValueError(f"rank_factor must be in (0, 1], got {rank_factor!r}")
    if linear.weight.is_meta:
        raise ValueError("the linear is on the meta device; load its weights first")
    out, into = linear.out_features, linear.in_features
    n_out = subnet_size(out, rank_factor) if n_out is None else n_out
    n_in = subnet_size(into, rank_factor) if n_in is None else n_in
    if not (1 <= n_out <= out and 1 <= n_in <= into):
        raise ValueError(
            f"a linear of {into} inputs and {out} outputs cannot hold a subnet of {n_in} inputs and "
            f"{n_out} outputs; choose larger factors or leave the layer out"
        )
    return n_out, n_in


@functools.cache
def _warn_stale() -> None:
    warnings.warn(
        "a subnet was changed but not written into its dense weight, so the forward does not see it: "
        "bind the optimizer with losia.bind(optimizer) (LosiaCallback does it for Trainer), or call write_back() after "
        "each step",
        UserWarning,
        stacklevel=6,
    )
