"""Linear maps that are not an ``nn.Linear``'s: stored transposed, or as one slice of many; and subnets in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .linear import SubnetLinear
from .sharded import is_sharded


class View:
    """A linear map ``y = x W^T + b`` whose ``W`` is a view of a parameter that some layer stores.

    Args:
        owner: the layer.
        name: its parameter that holds ``W``: a matrix, or, with ``index``, a stack of them ``(n, ., .)``.
        index: which of a stack's matrices it is.
        transposed: each is stored as ``(in, out)``, not as ``(out, in)``.
        bias: its parameter that holds ``b``, if it has one: ``(out,)``, of a stack ``(n, out)``.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        index: int | None = None,
        transposed: bool = False,
        bias: str | None = None,
    ) -> None:
        self.owner, self.name, self.index = owner, name, index
        self.transposed, self.bias_name = transposed, bias

    @property
    def key(self) -> str:
        """Its name within the layer; empty where the layer is this one map."""
        return "" if self.index is None else f"{self.name}.{self.index}"

    @property
    def stored(self) -> Any:
        """The parameter that ``weight`` is a view of."""
        return self.owner._parameters[self.name]

    @property
    def weight(self) -> Tensor:
        """``W`` ``(out, in)``, looked up afresh: conversions of the layer may replace its parameters; a TypeError if
        its parameter is sharded."""
        if is_sharded(self.stored):
            raise TypeError(
                f"a view of {self.name}, which is sharded: experts in a stack and linears that are stored transposed "
                "do not train under FSDP2; use DistributedDataParallel, or leave them out with target_modules"
            )
        matrix: Tensor = self._part(self.stored)
        return matrix.t() if self.transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        """``b`` ``(out,)``, or None."""
        return None if self.stored_bias is None else self._part(self.stored_bias)

    @property
    def stored_bias(self) -> Any:
        """The parameter that ``bias`` is a view of, or None."""
        return None if self.bias_name is None else self.owner._parameters[self.bias_name]

    def _part(self, stored: Any) -> Any:
        return stored if self.index is None else stored[self.index]

    @property
    def out_features(self) -> int:
        return self.stored.shape[-1 if self.transposed else -2]  # type: ignore[no-any-return]

    @property
    def in_features(self) -> int:
        return self.stored.shape[-2 if self.transposed else -1]  # type: ignore[no-any-return]


AnyLinear = nn.Linear | View


class SubnetView(SubnetLinear):
    """A ``SubnetLinear`` whose ``weight`` and ``bias`` are views of another layer's parameters.

    It has the parameter ``subnet`` alone, until it takes the place of a layer (``stand_in_for``).
    """

    view: View

    def _adopt(self, linear: AnyLinear) -> None:
        assert isinstance(linear, View)
        self.view = linear
        linear.stored.requires_grad_(False)
        if linear.stored_bias is not None:
            linear.stored_bias.requires_grad_(False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.view.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.view.bias

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        return self.view.weight, self.view.bias

    def stand_in_for(self, layer: nn.Module) -> SubnetView:
        """Take over the parameters of a layer that is this one linear map, under their names, and its hooks."""
        take_over(self, layer)
        self.view.owner = self
        return self

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` that shares storage with the layer's parameters (subnet written back)."""
        self.write_back()
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        bias = self.bias
        linear.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )
        return linear.train(self.training)


class SubnetHost(nn.Module):
    """Stands in for a layer that stores several linear maps: the same parameters, buffers and children under the
    same names, and a subnet in each of the maps. A subclass says how the layer computes.

    Attributes:
        plain: the layer itself, as ``(layer,)``, not as a child; it shares all parameters and children.
        units: the maps' ``SubnetView`` by name within the layer.
        subnets: they again, as children, by the parameter that they are slices of.
    """

    def __init__(self, layer: nn.Module, units: Mapping[str, SubnetView]) -> None:
        super().__init__()
        take_over(self, layer)
        self.plain, self.units = (layer,), dict(units)
        by_parameter: dict[str, list[SubnetView]] = {}
        for unit in units.values():
            unit.view.owner = self
            by_parameter.setdefault(unit.view.name, []).append(unit)
        self.subnets = nn.ModuleDict({k: nn.ModuleList(v) for k, v in by_parameter.items()})

    def _apply(self, fn: Any, recurse: bool = True) -> SubnetHost:
        super()._apply(fn, recurse)
        for unit in self.units.values():  # children come before the parameters they are views of
            unit._apply(lambda t: t)
        return self


def take_over(new: nn.Module, layer: nn.Module) -> None:
    """Give a module the parameters, buffers, children, hooks and mode of the layer whose place it takes."""
    for room in ("_parameters", "_buffers", "_modules"):
        new.__dict__[room].update(layer.__dict__[room])
    new._non_persistent_buffers_set.update(layer._non_persistent_buffers_set)
    new.__dict__.update({k: v for k, v in layer.__dict__.items() if "_hook" in k})
    new.training = layer.training
