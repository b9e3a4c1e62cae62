"""Deltas: what training changed, in one safetensors file with a JSON header; never pickle.

Each linear is stored in the smaller of two forms, with absolute values in the weight's dtype:

- blocks: ``<name>.out_idx.<k>``, ``<name>.in_idx.<k>`` (int64) and ``<name>.values.<k>``, one for each place
  its subnet was in;
- bitmap: ``<name>.mask`` (uint8, one bit an entry, row-major, least significant bit first) and
  ``<name>.values``, the marked entries in order.

Trained biases are stored whole as ``<name>.bias``. The header's ``base`` identifies the weights before
training, so that a delta cannot land on another base.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .linear import SubnetLinear

FORMAT = "losia-pro-delta"
VERSION = "1"
FORMS = ("blocks", "bitmap")

Block = tuple[Tensor, Tensor]


@torch.no_grad()
def digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values: SHA-256 over the row and column sums of each weight's
    bits, taken as integers. Exact on every device, one pass over the weights, nothing of their size
    allocated."""
    h = hashlib.sha256()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name in sorted(weights):
        w = weights[name].detach()
        h.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        bits = w.view(integer[w.element_size()])
        for axis in (0, 1):
            h.update(str(bits.sum(axis, dtype=torch.int64).tolist()).encode())
    return h.hexdigest()


def save(
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, Tensor],
    touched: Mapping[str, list[Block]],
    biases: Mapping[str, Tensor],
    header: Mapping[str, str],
) -> None:
    """Write the touched entries of ``weights``; the file appears whole, or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    from safetensors.torch import save_file

    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    tensors: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, weight in weights.items():
        forms[name], parts = _encode(weight.detach(), touched[name])
        tensors.update({f"{name}.{key}": t for key, t in parts.items()})
    for name, bias in biases.items():
        tensors[f"{name}.bias"] = bias.detach().cpu().contiguous()
    about = {"format": FORMAT, "version": VERSION, "modules": json.dumps(forms), **header}
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as room:
        complete = os.path.join(room, "delta")
        save_file(tensors, complete, about)
        _to_disk(complete)
        os.replace(complete, path)
    _to_disk(folder)


def _to_disk(path: str) -> None:
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
    try:
        forms = _forms(header)
        linears = {name: _linear(model, name) for name in forms}
        found = digest({name: linear.weight for name, linear in linears.items()})
        if found != header.get("base"):
            raise ValueError(
                f"the delta was made from other weights (base {header.get('base', 'unknown')[:12]}, this "
                f"model {found[:12]}); load the base model that was fine-tuned, in the same dtype"
            )
        known: set[str] = set()
        for name, form in forms.items():
            known |= _check(linears[name], form, name, tensors)
        if extra := tensors.keys() - known:
            raise ValueError(f"malformed delta: {min(extra)} belongs to none of its modules")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, form in forms.items():
            linear = linears[name]
            blocks = _decode(linear.weight, form, name, tensors)
            if f"{name}.bias" in tensors:
                linear.bias.copy_(tensors[f"{name}.bias"])
            if isinstance(linear, SubnetLinear):
                linear.adopt_weight()
                linear.loaded_blocks += blocks
                linear.loaded_bias |= f"{name}.bias" in tensors
    return model


def _forms(header: Mapping[str, str]) -> dict[str, str]:
    """The form of each module, by name, out of the header."""
    try:
        forms = json.loads(header.get("modules", ""))
    except (ValueError, RecursionError):
        forms = None
    if not isinstance(forms, dict) or not forms or not all(f in FORMS for f in forms.values()):
        raise ValueError("malformed delta: its header does not list modules and their forms")
    return forms


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"the delta is for a model with the linear {name}, which this one lacks")
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
        raise FileNotFoundError(f"{path}: no such delta file")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a delta of losia-pro")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: delta version {header.get('version')}; this release reads version {VERSION}"
        )
    return header, tensors


def _encode(weight: Tensor, blocks: list[Block]) -> tuple[str, dict[str, Tensor]]:
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    block_bytes = 0
    for rows, columns in blocks:
        mask[rows[:, None], columns] = True
        n = rows.numel() * columns.numel()
        block_bytes += n * weight.element_size() + 8 * (rows.numel() + columns.numel())
    bitmap_bytes = int(mask.sum()) * weight.element_size() + -(-mask.numel() // 8)
    if block_bytes <= bitmap_bytes:
        parts = {}
        for k, (rows, columns) in enumerate(blocks):
            on = rows.to(weight.device), columns.to(weight.device)
            parts[f"out_idx.{k}"], parts[f"in_idx.{k}"] = rows.clone(), columns.clone()
            parts[f"values.{k}"] = weight[on[0][:, None], on[1]].cpu().contiguous()
        return "blocks", parts
    bits = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return "bitmap", {"mask": packed, "values": weight[mask.to(weight.device)].cpu()}


def _unpack(packed: Tensor) -> Tensor:
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()


def _check(linear: nn.Linear, form: str, name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of one module's tensors; a ValueError if one is missing or does not fit the module."""
    known: set[str] = set()
    weight = linear.weight

    def take(part: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        key = f"{name}.{part}"
        if key not in tensors:
            raise ValueError(f"malformed delta: {key} is missing")
        t = tensors[key]
        fits = t.dim() == len(shape) and all(
            n in (None, m) for n, m in zip(shape, t.shape, strict=True)
        )
        if t.dtype != dtype or not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"malformed delta: {key} is {t.dtype} {tuple(t.shape)}, not {dtype} ({wanted})"
            )
        known.add(key)
        return t

    def take_indices(part: str, size: int) -> int:
        idx = take(part, torch.int64, None)
        ordered = bool((idx[1:] > idx[:-1]).all())
        if not (len(idx) and ordered and int(idx[0]) >= 0 and int(idx[-1]) < size):
            raise ValueError(
                f"malformed delta: {name}.{part} is not of ascending indices below {size}"
            )
        return len(idx)

    if form == "bitmap":
        bits = _unpack(take("mask", torch.uint8, -(-weight.numel() // 8)))
        if bool(bits[weight.numel() :].any()):
            raise ValueError(f"malformed delta: {name}.mask marks entries beyond the last")
        take("values", weight.dtype, int(bits.sum()))
    else:
        k = 0
        while k == 0 or any(f"{name}.{p}.{k}" in tensors for p in ("out_idx", "in_idx", "values")):
            n_out = take_indices(f"out_idx.{k}", weight.shape[0])
            n_in = take_indices(f"in_idx.{k}", weight.shape[1])
            take(f"values.{k}", weight.dtype, n_out, n_in)
            k += 1
    if f"{name}.bias" in tensors:
        if linear.bias is None:
            raise ValueError(f"the delta holds a bias of {name}, which has none in this model")
        take("bias", linear.bias.dtype, *linear.bias.shape)
    return known


def _decode(weight: Tensor, form: str, name: str, tensors: Mapping[str, Tensor]) -> list[Block]:
    """Write one module's entries; returns blocks that hold them all."""
    if form == "bitmap":
        bits = _unpack(tensors[f"{name}.mask"])
        mask = bits[: weight.numel()].view(weight.shape)
        weight[mask.to(weight.device)] = tensors[f"{name}.values"].to(weight.device)
        return [(mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten())]
    blocks: list[Block] = []
    while f"{name}.out_idx.{len(blocks)}" in tensors:
        rows, columns, values = (
            tensors[f"{name}.{part}.{len(blocks)}"] for part in ("out_idx", "in_idx", "values")
        )
        on = rows.to(weight.device), columns.to(weight.device)
        weight[on[0][:, None], on[1]] = values.to(weight.device)
        blocks.append((rows, columns))
    return blocks
