"""The controller's own state: what the model's and the optimizer's state dicts do not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import base, sharded
from .profile import Profile
from .reselect import Reselection
from .selection import groups_of, select_together

if TYPE_CHECKING:
    from .controller import Losia

STATE_VERSION = 4


# Settings that a resumed run must share with the one it continues.
SETTINGS = (
    "period",
    "schedule",
    "strategy",
    "importance",
    "score",
    "beta1",
    "beta2",
    "rewarm",
    "base_decay",
    "share_inputs",
    "subnet_dtype",
)
# Those that are compared by what they make of each linear.
SIZES = ("rank_factor", "in_factor", "out_factor", "neuron_group")
KEYS = {"version", "config", "base_digest", "step", "history", "modules"}


def state_of(losia: Losia) -> dict[str, Any]:
    """See ``Losia.state_dict``. What can be more or less of than in a fresh run is in tuples, which
    ``torch.distributed.checkpoint`` takes as one object each; all else it puts where a fresh run has the like."""
    base.refuse(losia)
    sharded.settle(losia.model)
    modules: dict[str, dict[str, Any]] = {}
    for name, m in losia.modules.items():
        modules[name] = {
            "features": (m.out_features, m.in_features),
            "out_idx": m.out_idx.clone(),
            "in_idx": m.in_idx.clone(),
            "subnet": _saved(m.subnet),
            "touched": tuple(m.touched.blocks),
            "base": tuple(m.touched.values),
            "base_bias": () if m.touched.bias is None else (m.touched.bias,),
            "profile": (),
        }
        if isinstance(m.profile, Profile):
            p = m.profile
            modules[name]["profile"] = _saved(p.importance), _saved(p.uncertainty)
    return {
        "version": STATE_VERSION,
        "config": losia.config.to_dict(),
        "base_digest": losia.base_digest,
        "step": losia.step,
        "history": [tuple(r) for r in losia.history],
        "modules": modules,
    }


def _saved(t: Tensor) -> Tensor:
    """A copy; of what is sharded the whole, on the CPU."""
    return sharded.whole(t).cpu() if sharded.is_sharded(t) else t.detach().clone()


def _check(losia: Losia, state: dict[str, Any]) -> None:
    """Raise a ValueError, before anything changes, for a state that is not this run's."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the state's version is {state.get('version')!r}; this release reads {STATE_VERSION}"
        )
    if missing := KEYS - state.keys():
        raise ValueError(
            f"not a state of Losia.state_dict(): it lacks {', '.join(sorted(missing))}"
        )
    saved = state["modules"]
    if saved.keys() != losia.modules.keys():
        odd = sorted(saved.keys() ^ losia.modules.keys())
        raise ValueError(f"the state is of other modules: {odd[0]} is on one side only")
    for key in SETTINGS:
        theirs, ours = state["config"].get(key), getattr(losia.config, key)
        if theirs != ours:
            raise ValueError(
                f"the state was saved with {key}={theirs!r}, this run has {key}={ours!r}"
            )
    then = replace(losia.config, **{key: state["config"].get(key) for key in SIZES})
    for name, m in losia.modules.items():
        s = saved[name]
        features, n = tuple(s["features"]), tuple(s["subnet"].shape)
        ours = (m.out_features, m.in_features), tuple(m.subnet.shape)
        if (features, n) != ours:
            raise ValueError(
                f"{name}: the state has a subnet {n} of {features}, this model {ours[1]} of {ours[0]}"
            )
        runs = groups_of(features, n, then.group(features[1], n[1] == features[1]))
        if runs != m.groups:
            raise ValueError(
                f"{name}: the state has outputs and inputs in runs of {runs[0]} and {runs[1]} (neuron_group), this run "
                f"of {m.groups[0]} and {m.groups[1]}"
            )


@torch.no_grad()
def restore(losia: Losia, state: dict[str, Any]) -> None:
    """See ``Losia.load_state_dict``."""
    base.refuse(losia)
    base.refuse_detached(losia)
    _check(losia, state)
    sharded.settle(losia.model)
    losia.step = state["step"]
    losia.history = [Reselection(*r) for r in state["history"]]
    losia.base_digest = state["base_digest"]
    losia._calibrated = True
    saved = state["modules"]
    for m in losia.modules.values():  # torch.distributed.checkpoint sets weights and tells nobody
        m.adopt_weight()
        m.touched = base.Touched()  # set below: what moves to the state's places is not the base's
    for names in losia.sets:
        modules = [losia.modules[n] for n in names]
        device = modules[0].out_idx.device
        out_idx = [saved[n]["out_idx"].to(device) for n in names]
        select_together(modules, out_idx, saved[names[0]]["in_idx"].to(device))
    for name, m in losia.modules.items():
        s = saved[name]
        sharded.assign_(m.subnet, s["subnet"])
        m.touched.blocks = [(o.cpu(), i.cpu()) for o, i in s["touched"]]
        m.touched.values = [values.cpu() for values in s["base"]]
        m.touched.bias = s["base_bias"][0].cpu() if s["base_bias"] else None
        m.profile = None
        if s["profile"]:
            m.profile = Profile(m, losia.config)
            sharded.assign_(m.profile.importance, s["profile"][0])
            sharded.assign_(m.profile.uncertainty, s["profile"][1])
    losia.write_back()
    if losia._optimizer is not None:
        losia._set_profiled()
        if losia._ranks:
            losia._ranks.check_start(losia, "at load_state_dict()")
