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
from typing import Any

import torch
from torch import Tensor, nn

from .linear import SubnetLinear

FORMAT = "losia-pro-delta"
VERSION = "1"

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
    """Write the touched entries of ``weights``, through a temporary file that is renamed when complete."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    for name, weight in weights.items():
        forms[name], parts = _encode(weight.detach(), touched[name])
        tensors.update({f"{name}.{key}": t for key, t in parts.items()})
    for name, bias in biases.items():
        tensors[f"{name}.bias"] = bias.detach().cpu().contiguous()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "modules": json.dumps(forms),
        **header,
    }
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, about)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Apply a delta to its base model, plain or attached, in place; returns the model.

    Raises:
        ValueError: not a delta, a truncated file, modules or shapes that the model lacks, or weights that
            are not the base it was made from. Nothing has changed then.
    """
    header, tensors = read(path)
    forms: dict[str, str] = json.loads(header["modules"])
    modules = dict(model.named_modules())
    linears: dict[str, Any] = {}
    for name in forms:
        if name not in modules or not hasattr(modules[name], "weight"):
            raise ValueError(f"{path}: the delta is for a model with {name}, which this one lacks")
        linears[name] = modules[name]
    found = digest({n: m.weight for n, m in linears.items()})
    if found != header["base"]:
        raise ValueError(
            f"{path}: the delta was made from other weights (base {header['base'][:12]}, this model "
            f"{found[:12]}); load the base model that was fine-tuned, in the same dtype"
        )
    with torch.no_grad():
        for name, form in forms.items():
            _decode(linears[name].weight, form, name, tensors)
            if f"{name}.bias" in tensors:
                linears[name].bias.copy_(tensors[f"{name}.bias"])
            if isinstance(linears[name], SubnetLinear):
                linears[name].adopt_weight()
    return model


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


def _decode(weight: Tensor, form: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    if form == "bitmap":
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = (tensors[f"{name}.mask"][:, None] >> shifts & 1).bool().flatten()
        mask = bits[: weight.numel()].view(weight.shape).to(weight.device)
        weight[mask] = tensors[f"{name}.values"].to(weight)
        return
    k = 0
    while f"{name}.out_idx.{k}" in tensors:
        rows, columns = tensors[f"{name}.out_idx.{k}"], tensors[f"{name}.in_idx.{k}"]
        values = tensors[f"{name}.values.{k}"].to(weight)
        weight.index_put_((rows.to(weight.device)[:, None], columns.to(weight.device)), values)
        k += 1
