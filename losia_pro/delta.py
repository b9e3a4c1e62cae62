"""Deltas: what training changed, in one safetensors file with a JSON header; never pickle.

The entries of each linear that may have changed are stored as absolute values (see ``entries``), trained biases
whole as ``<name>.bias``. The header's ``base`` identifies the linears' weights and biases before training, so that
a delta cannot land on another base; ``modules`` has each linear's form, and ``shapes`` its weight's shape.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import sharded
from .base import BaseValues
from .entries import FORMS, bounds, check_entries, decode, encode
from .kinds import find_linear
from .linear import SubnetLinear
from .views import AnyLinear

if TYPE_CHECKING:
    from .controller import Losia

FORMAT = "losia-pro-delta"
VERSION = "2"


@torch.no_grad()
def digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values: SHA-256 over the row and column sums of each weight's
    bits, taken as integers; of each element's, where it is no matrix. Exact on every device, one pass over the
    weights, nothing of their size allocated."""
    h = hashlib.sha256()
    for name in sorted(weights):
        w = sharded.whole(weights[name])
        h.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        w = w if w.dim() == 2 else w.reshape(-1, 1)
        for axis in (0, 1):
            h.update(str(_bits(w).sum(axis, dtype=torch.int64).tolist()).encode())
    return h.hexdigest()


def base_of(linears: Mapping[str, AnyLinear]) -> str:
    """What identifies a base model: the digest of its linears' weights and biases."""
    biases = {f"{n}.bias": m.bias for n, m in linears.items() if m.bias is not None}
    return digest({n: m.weight for n, m in linears.items()} | biases)


def check_base(losia: Losia) -> None:
    """Raise a RuntimeError unless all that a delta of the run leaves out is as the base model has it."""
    with BaseValues(losia):
        found = base_of(losia.modules)
    if found != losia.base_digest:
        raise RuntimeError(
            "weights were loaded or changed after attach(), or converted to another dtype, in places that were never "
            "trained, which a delta leaves out; call attach() on the model once it has its weights, or save it whole"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(integer[t.element_size()])


def save(path: str | os.PathLike[str], losia: Losia) -> None:
    """Write the touched entries of a run's linears; the file appears whole, or not at all. If they are sharded, the
    first process writes it, and each knows then how that went.

    Raises:
        FileNotFoundError: the folder does not exist.
        RuntimeError: see ``check_base``.
    """
    check_base(losia)
    modules = losia.modules
    forms, tensors = contents(modules)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "modules": json.dumps(forms),
        "shapes": json.dumps({name: list(m.weight.shape) for name, m in modules.items()}),
        "base": losia.base_digest,
        "config": json.dumps(losia.config.to_dict()),
    }
    weights = [m.weight for m in modules.values()]
    sharded.first_alone(weights, lambda: _write(os.path.abspath(path), tensors, about))


def _write(path: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as room:
        complete = os.path.join(room, "delta")
        save_file(tensors, complete, about)
        with open(os.path.join(room, "new"), "xb") as new:  # safetensors writes for its owner alone
            shutil.copymode(new.name, complete)
        to_disk(complete)
        os.replace(complete, path)
    to_disk(folder)


def contents(
    modules: Mapping[str, SubnetLinear], form: str | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The form of each module, by default the smaller one, and a delta's tensors, on the CPU."""
    tensors: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, m in modules.items():
        forms[name], parts = encode(sharded.whole(m.weight), m.touched.blocks, form)
        tensors.update({f"{name}.{key}": t for key, t in parts.items()})
        if m.bias is not None and m.touched.bias is not None:
            tensors[f"{name}.bias"] = sharded.whole(m.bias).cpu().contiguous()
    return forms, tensors


def to_disk(path: str) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Apply a delta to its base model, plain or attached, in place; returns the model. A delta that is saved
    from the attached one later holds what was loaded too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a delta, a truncated or malformed one, modules that the model lacks, or weights that
            are not the base it was made from. Nothing has changed then.
    """
    header, tensors = read(path)
    sharded.settle(model)
    try:
        linears = targets(model, header, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    put(linears, tensors)
    return model


@torch.no_grad()
def put(linears: Mapping[str, AnyLinear], tensors: Mapping[str, Tensor]) -> None:
    """Write a delta's entries, checked before, into the base's linears, plain or attached."""
    for name, linear in linears.items():
        weight, entries = linear.weight, decode(linear.weight, name, tensors)
        bias = tensors.get(f"{name}.bias")
        if isinstance(linear, SubnetLinear):
            for at, _ in entries:
                linear.touched.add(weight, *bounds(at))
            if bias is not None:
                linear.touched.add_bias(linear.bias)
        for at, values in entries:
            sharded.write_(weight, at, values)
        if bias is not None and linear.bias is not None:
            sharded.assign_(linear.bias, bias)
        if isinstance(linear, SubnetLinear):
            linear.adopt_weight()


def targets(
    model: nn.Module, header: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, AnyLinear]:
    """The linears of ``model`` that a delta is for, by name.

    Raises:
        ValueError: ``model`` is not the base that it was made from, or the delta is malformed.
    """
    forms = modules_of(header)
    linears = {name: _linear(model, name) for name in forms}
    found = base_of(linears)
    if found != header.get("base"):
        theirs = {t.dtype for key, t in tensors.items() if ".values" in key}
        ours = {linear.weight.dtype for linear in linears.values()}
        say = "/".join(sorted(str(t).removeprefix("torch.") for t in theirs)) or "the same dtype"
        raise ValueError(
            f"the delta was made from other weights (base {header.get('base', 'unknown')[:12]}, this "
            f"model {found[:12]}); load the base model that was fine-tuned, in {say}"
            + (", which this one is not in" if theirs and not theirs & ours else "")
        )
    check(linears, forms, tensors)
    return linears


def check(
    linears: Mapping[str, AnyLinear], forms: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError unless the tensors are all there, fit the linears, and no others are there."""
    known: set[str] = set()
    for name, form in forms.items():
        known |= check_entries(linears[name], form, name, tensors)
    if extra := tensors.keys() - known:
        raise ValueError(f"malformed delta: {min(extra)} belongs to none of its modules")


def modules_of(header: Mapping[str, str]) -> dict[str, str]:
    """The form of each module, by name, out of the header; a ValueError if they are not there."""
    try:
        forms = json.loads(header.get("modules", ""))
    except (ValueError, RecursionError):
        forms = None
    if not isinstance(forms, dict) or not forms or not all(f in FORMS for f in forms.values()):
        raise ValueError("malformed delta: its header does not list modules and their forms")
    return forms


def _linear(model: nn.Module, name: str) -> AnyLinear:
    linear = find_linear(model, name)
    if linear is None:
        raise ValueError(f"the delta is for a model with the linear {name}, which this one lacks")
    if isinstance(linear, SubnetLinear):
        linear.touched.refuse_base()
    if linear.weight.is_meta:
        raise ValueError(f"{name} is on the meta device; load the model's weights first")
    return linear


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a delta file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, a truncated one, or one that holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        folder = (
            " (a folder: a delta is one file, delta.safetensors)" if os.path.isdir(path) else ""
        )
        raise FileNotFoundError(f"{path}: no such delta file{folder}")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a safetensors file, but not a delta of losia-pro (PEFT's adapters and whole models are loaded "
            "by their own from_pretrained)"
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: delta version {header.get('version')}; this release reads version {VERSION}"
        )
    return header, tensors
