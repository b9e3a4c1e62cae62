"""PEFT: LoSiA as one of its methods, under the name ``LOSIA``."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn

from .. import base, config, delta
from ..controller import Losia, attach
from ..distributed import IGNORED

if not hasattr(BaseTuner, "_get_adapter_state_dict"):
    raise ImportError(
        f"losia_pro.peft needs PEFT 0.21 or later, in which a method says itself what it saves; this is "
        f"{peft.__version__}. losia_pro.attach works without PEFT"
    )

PREFIX = "base_model.model."  # of names in a PeftModel
BASE = "losia_base"  # of the adapter's tensor that identifies the base model


class PeftType(str, enum.Enum):
    """The method's name, as PEFT's own enum has those of the others."""

    LOSIA = "LOSIA"


class _Config(peft.PeftConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOSIA
        self.settings()

    def settings(self) -> config.LosiaConfig:
        """What ``attach`` takes."""
        names = [f.name for f in dataclasses.fields(config.LosiaConfig)]
        return config.LosiaConfig(**{name: getattr(self, name) for name in names})


LosiaConfig = dataclasses.make_dataclass(
    "LosiaConfig",
    [
        *((f.name, f.type, f.default) for f in dataclasses.fields(config.LosiaConfig)),
        ("modules_to_save", "list[str] | None", None),
    ],
    bases=(_Config,),
    namespace={"__module__": __name__},
)
LosiaConfig.__doc__ = """``losia_pro.LosiaConfig`` as PEFT takes it.

``get_peft_model(model, losia_pro.peft.LosiaConfig(period=100))``. Besides the settings of
``losia_pro.LosiaConfig``, PEFT's own, as ``task_type``; and ``modules_to_save``, the names of modules that are
trained and saved whole, a new classifier say.

Raises:
    ValueError: as ``losia_pro.LosiaConfig``.
"""


class LosiaModel(BaseTuner):
    """What PEFT makes of a model and a ``LosiaConfig``: ``losia_pro.attach(model, config)``, as ``.losia``.

    The dense weights hold the tuned values, so an adapter that is on costs nothing, and merging copies nothing; the
    base's values of what has changed are kept on the CPU. The adapter's file holds the places that were trained,
    their values as they are, and a digest of the base model.

    ``disable_adapter`` puts the base's values in place; a forward within trains nothing.

    Raises:
        ValueError: a second adapter; an adapter of another base model, or a malformed one; meta weights
            (``low_cpu_mem_usage=True``). What was there is unchanged.
    """

    prefix = "losia_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # the controller, which a model with its layers alone would lack
    losia: Losia

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if "losia" in self.__dict__:
            raise ValueError(
                f"a model takes one LoSiA adapter, and this one has {self.active_adapters[0]!r}: merge_and_unload() "
                "or unload() it first; in TRL, give peft_config to the trainer and leave get_peft_model to it"
            )
        if nn.Linear(1, 1).weight.is_meta:  # within accelerate's init_empty_weights()
            raise ValueError(
                "low_cpu_mem_usage=True would put the model's own weights on the meta device, for the tuned values "
                "are in them; leave it False"
            )
        settings: Any = self.peft_config[adapter_name]
        self.losia = attach(model, settings.settings())
        self.switch = Switch(self.losia, adapter_name)
        self.targeted_module_names = list(self.losia.modules)
        set_additional_trainable_modules(
            model=model,
            peft_config=settings,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
        )
        self.set_adapter(adapter_name, inference_mode=settings.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # inject_adapter does all of it

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """As ``DistributedDataParallel`` finds the names in a ``PeftModel``."""
        return [PREFIX + name for name in getattr(self.model, IGNORED, ())]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.switch.train_subnets(not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.switch.train_subnets(requires_grad)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: the adapter is in the model's own weights, on for all of a batch or for none; use "
                "disable_adapter() around a batch for the base model"
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        raise ValueError(
            f"{adapter_name!r} is in the model's own weights; unload() gives the base model back"
        )

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.switch.enable_adapters(enabled)

    def _check_merge_allowed(self) -> None:
        """Nothing is copied, so tied weights stay tied."""

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        self.switch.enable_adapters(True)
        if not merge:
            base.reset(self.losia)
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        return self.losia.detach()

    # --- files --------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        losia: Losia = model.losia
        losia.write_back()
        delta.check_base(losia)
        _, tensors = delta.contents(losia.modules, form="blocks")
        digest = torch.frombuffer(bytearray.fromhex(losia.base_digest), dtype=torch.uint8)
        return {PREFIX + name: t for name, t in tensors.items()} | {BASE: digest}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # there is none in it

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Puts the adapter's values into the model; what is left is PEFT's to load."""
        losia: Losia = model.losia
        ours: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            name = key.removeprefix(PREFIX)
            module = name.rpartition(".")[0]
            if module in losia.modules or module.rpartition(".")[0] in losia.modules:
                ours[name] = tensor
            elif name != BASE:
                others[key] = tensor
        _check_base(state_dict.get(BASE), ours, losia)
        delta.check(losia.modules, dict.fromkeys(losia.modules, "blocks"), ours)
        base.reset(losia)
        delta.put(losia.modules, ours)
        return others


class Switch(nn.Module, BaseTunerLayer):
    """The one layer that PEFT sees: whether the adapter is on."""

    def __init__(self, losia: Losia, adapter_name: str) -> None:
        super().__init__()
        self.trained = losia.parameters()
        self.values = losia.base()
        self.before: list[bool] = []
        self._active_adapter = adapter_name

    def _get_available_adapters(self) -> set[str]:
        return {*self.active_adapters}

    def train_subnets(self, requires_grad: bool) -> None:
        if self.disable_adapters:  # it counts once the adapter is on again
            self.before = [requires_grad] * len(self.trained)
            return
        for p in self.trained:
            p.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        if enabled is not self.disable_adapters:
            return
        if enabled:
            self.values.__exit__(None, None, None)
            for p, trained in zip(self.trained, self.before, strict=True):
                p.requires_grad_(trained)
        else:
            self.before = [p.requires_grad for p in self.trained]
            self.train_subnets(False)
            self.values.__enter__()
        self._disable_adapters = not enabled


def _check_base(digest: Tensor | None, tensors: dict[str, Tensor], losia: Losia) -> None:
    """Raise a ValueError unless the adapter was made from this model."""
    dtypes = {t.dtype for name, t in tensors.items() if ".values." in name}
    if dtypes and dtypes != {m.weight.dtype for m in losia.modules.values()}:
        names = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"the adapter holds {names} values, those of the model that was fine-tuned, and this model has other "
            f"dtypes; load it with dtype={names}"
        )
    found = "nothing" if digest is None else bytes(digest.cpu().tolist()).hex()
    if found != losia.base_digest:
        raise ValueError(
            f"the adapter was made from other weights (base {found[:12]}, this model {losia.base_digest[:12]}); "
            "load the base model that was fine-tuned"
        )


# As PEFT's register_peft_method, which takes names of PEFT's own enum only.
_METHOD: Any = PeftType.LOSIA
PEFT_TYPE_TO_CONFIG_MAPPING[_METHOD] = LosiaConfig
PEFT_TYPE_TO_TUNER_MAPPING[_METHOD] = LosiaModel
PEFT_TYPE_TO_PREFIX_MAPPING[_METHOD] = LosiaModel.prefix
