"""A delta that is damaged, foreign or for another base is refused before anything in the model changes."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toys
from torch import nn

import losia_pro
from losia_pro import LosiaConfig

# 61 x 65 entries: three bits of a bitmap's last byte are padding.
WIDTH, HIDDEN = 61, 65
BLOCKS = {"rank_factor": 1 / 8, "period": None, "train_bias": True}
BITMAP = {"rank_factor": 1 / 8, "period": 1, "schedule": "sync", "train_bias": True}
LAST = "layers.1.down"


def base() -> nn.Module:
    return toys.stack(torch.bfloat16, n_blocks=2, width=WIDTH, hidden=HIDDEN)


def make(settings: dict, path: Path) -> nn.Module:
    """Write a delta; returns the tuned model."""
    model = base()
    losia = losia_pro.attach(model, LosiaConfig(**settings))
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.5)
    losia.bind(optimizer)
    data = [(x.bfloat16(), y) for x, y in toys.batches(8, width=WIDTH)]
    list(toys.train(model, optimizer, data))
    losia.save_delta(path)
    return losia.detach()


class Valid:
    """A valid delta of each form: its tuned model, bytes, header and tensors."""

    def __init__(self, path: Path, settings: dict, form: str) -> None:
        self.tuned = make(settings, path)
        self.bytes = path.read_bytes()
        with safetensors.safe_open(path, framework="pt") as f:
            self.header = dict(f.metadata())
            self.tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
        assert set(json.loads(self.header["modules"]).values()) == {form}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, Valid]:
    folder = tmp_path_factory.mktemp("valid")
    return {
        "bitmap": Valid(folder / "bitmap", BITMAP, "bitmap"),
        "blocks": Valid(folder / "blocks", BLOCKS, "blocks"),
    }


def attached() -> nn.Module:
    return losia_pro.attach(base(), LosiaConfig(rank_factor=1 / 2)).model


def refuse(path: Path, message: str, *models: nn.Module, error=ValueError) -> None:
    """Loading raises, names the file, and leaves the model as it was: by default a plain and an attached
    base."""
    for model in models or (base(), attached()):
        before = toys.snapshot(model)
        with pytest.raises(error, match=message) as raised:
            losia_pro.load_delta(model, path)
        assert str(path) in str(raised.value)
        toys.assert_same(before, toys.snapshot(model))


def test_the_valid_ones_load(valid, tmp_path):
    for form, v in valid.items():
        (tmp_path / form).write_bytes(v.bytes)
        model = losia_pro.load_delta(base(), tmp_path / form)
        toys.equal_bits(model.state_dict(), v.tuned.state_dict())


def modules(change):
    def edit(header):
        header["modules"] = json.dumps(change(json.loads(header["modules"])))

    return edit


HEADERS = {
    "no modules": (lambda h: h.pop("modules"), "does not list modules"),
    "not json": (lambda h: h.update(modules="{'a': blocks"), "does not list modules"),
    "nested without end": (lambda h: h.update(modules="[" * 100_000), "does not list modules"),
    "a list": (modules(list), "does not list modules"),
    "no module at all": (modules(lambda m: {}), "does not list modules"),
    "unknown form": (modules(lambda m: {**m, LAST: "zip"}), "does not list modules"),
    "form that is no word": (modules(lambda m: {**m, LAST: ["blocks"]}), "does not list modules"),
    "module that is not there": (modules(lambda m: {**m, "layers.7.up": "blocks"}), "the linear layers.7.up"),
    "module below a linear": (modules(lambda m: {**m, "layers.0.up.a": "bitmap"}), "the linear layers.0.up.a"),
    "norm": (modules(lambda m: {**m, "norm": "blocks"}), "the linear norm"),
    "block": (modules(lambda m: {**m, "layers.0": "blocks"}), "the linear layers.0"),
    "parameter": (modules(lambda m: {**m, "head.weight": "blocks"}), "the linear head.weight"),
    "the model itself": (modules(lambda m: {**m, "": "blocks"}), "the linear "),
    "module left out": (modules(lambda m: {k: m[k] for k in m if k != LAST}), "other weights"),
    "module of no entries": (modules(lambda m: {**m, "head": "blocks"}), "other weights"),
    "no base": (lambda h: h.pop("base"), r"other weights \(base unknown"),
    "another base": (lambda h: h.update(base="0" * 64), r"other weights \(base 0{12}, this model"),
    "no format": (lambda h: h.pop("format"), "not a delta of losia-pro"),
    "another format": (lambda h: h.update(format="pt"), "not a delta of losia-pro"),
    "no version": (lambda h: h.pop("version"), "version None; this release reads version 2"),
    "later version": (lambda h: h.update(version="3"), "version 3; this release reads version 2"),
    "nothing": (lambda h: h.clear(), "not a delta of losia-pro"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["blocks", "bitmap"])
@pytest.mark.parametrize(("edit", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong_in_one_place_is_refused(edit, message, form, valid, tmp_path):
    header = dict(valid[form].header)
    edit(header)
    safetensors.torch.save_file(valid[form].tensors, tmp_path / "d", header or None)
    refuse(tmp_path / "d", message)


def put(key, value):
    """An edit of one tensor of the last module."""
    return lambda t: t.__setitem__(f"{LAST}.{key}", value(t[f"{LAST}.{key}"]))


def longer(t):
    return torch.cat([t, t[-1:]])


def swapped(t):
    return torch.cat([t[1:2], t[:1], t[2:]])


def at(k, value):
    def change(t):
        t = t.clone()
        t[k] = value
        return t

    return change


def flipped(byte, bit):
    return lambda t: at(byte, int(t[byte]) ^ 1 << bit)(t)


TENSORS = {
    "blocks": {
        **{f"no {k}": (lambda t, k=k: t.pop(f"{LAST}.{k}.0"), f"{LAST}.{k}.0 is missing")
           for k in ("out_idx", "in_idx", "values")},
        "float rows": (put("out_idx.0", lambda t: t.float()), "out_idx.0 is torch.float32 "),
        "int32 columns": (put("in_idx.0", lambda t: t.int()), "in_idx.0 is torch.int32 "),
        "rows as a matrix": (put("out_idx.0", lambda t: t[None]), r"out_idx.0 is torch.int64 \(1, 7\)"),
        "no rows": (put("out_idx.0", lambda t: t[:0]), "not of ascending indices below 61"),
        "rows too large": (put("out_idx.0", at(-1, WIDTH)), "not of ascending indices below 61"),
        "columns too large": (put("in_idx.0", at(-1, HIDDEN)), "not of ascending indices below 65"),
        "negative row": (put("out_idx.0", at(0, -1)), "not of ascending indices"),
        "equal columns": (put("in_idx.0", lambda t: at(1, int(t[0]))(t)), "not of ascending indices"),
        "rows in disorder": (put("out_idx.0", swapped), "not of ascending indices"),
        "a row too few": (put("out_idx.0", lambda t: t[:-1]), r"values.0 is .* \(7, 8\), not .* \(6, 8\)"),
        "values transposed": (put("values.0", lambda t: t.T.contiguous()), r"values.0 is .* \(8, 7\)"),
        "values in a row": (put("values.0", lambda t: t.flatten()), r"values.0 is .* \(56,\)"),
        "values in fp32": (put("values.0", lambda t: t.float()), "torch.float32 .* not torch.bfloat16"),
        "values in fp16": (put("values.0", lambda t: t.half()), "torch.float16 .* not torch.bfloat16"),
        "values as bits": (put("values.0", lambda t: t.view(torch.int16)), "torch.int16 .*"),
        "half a block more": (lambda t: t.update({f"{LAST}.values.1": torch.ones(1)}), "out_idx.1 is missing"),
        "a block after a gap": (lambda t: t.update({f"{LAST}.values.2": torch.ones(1)}), "values.2 belongs to none"),
        "a mask besides": (lambda t: t.update({f"{LAST}.mask": torch.ones(1)}), "mask belongs to none"),
    },
    "bitmap": {
        "no mask": (lambda t: t.pop(f"{LAST}.mask"), f"{LAST}.mask is missing"),
        "no values": (lambda t: t.pop(f"{LAST}.values"), f"{LAST}.values is missing"),
        "bool mask": (put("mask", lambda t: t.bool()), "mask is torch.bool"),
        "short mask": (put("mask", lambda t: t[:-1]), r"mask is torch.uint8 \(495,\), not torch.uint8 \(496\)"),
        "long mask": (put("mask", longer), r"mask is torch.uint8 \(497,\), not torch.uint8 \(496\)"),
        "mask as a matrix": (put("mask", lambda t: t[None]), r"mask is torch.uint8 \(1, 496\)"),
        "no mask bytes": (put("mask", lambda t: t[:0]), r"mask is torch.uint8 \(0,\)"),
        "one entry more or less": (put("mask", flipped(3, 5)), f"{LAST}.values is torch.bfloat16"),
        "an entry in the padding": (put("mask", flipped(495, 7)), "mask marks entries beyond the last"),
        "first entry in the padding": (put("mask", flipped(495, 61 * 65 % 8)), "marks entries beyond the last"),
        "a value too many": (put("values", longer), f"{LAST}.values is"),
        "a value too few": (put("values", lambda t: t[1:]), f"{LAST}.values is"),
        "no values left": (put("values", lambda t: t[:0]), f"{LAST}.values is"),
        "values as a matrix": (put("values", lambda t: t[None]), f"{LAST}.values is"),
        "values in fp32": (put("values", lambda t: t.float()), "torch.float32 .* not torch.bfloat16"),
        "a block besides": (lambda t: t.update({f"{LAST}.values.0": torch.ones(1)}), "values.0 belongs to none"),
    },
}  # fmt: skip
BIASES = {
    "short bias": (lambda t: t.update({"layers.1.up.bias": torch.ones(8).bfloat16()}), r"bias is .* \(8,\)"),
    "bias in fp32": (lambda t: t.update({"layers.1.up.bias": torch.ones(65)}), "bias is torch.float32"),
    "bias of a linear without": (lambda t: t.update({f"{LAST}.bias": torch.ones(61)}), "which has none in this"),
    "bias of another linear": (lambda t: t.update({"head.bias": torch.ones(8)}), "head.bias belongs to none"),
    "another tensor": (lambda t: t.update(extra=torch.ones(1)), "extra belongs to none of its modules"),
}  # fmt: skip
EDITS = {
    f"{form}: {what}": (form, *edit)
    for form, edits in TENSORS.items()
    for what, edit in {**edits, **BIASES}.items()
}


@pytest.mark.parametrize(("form", "edit", "message"), EDITS.values(), ids=EDITS)
def test_a_tensor_that_is_wrong_in_one_place_is_refused(form, edit, message, valid, tmp_path):
    tensors = dict(valid[form].tensors)
    edit(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "d", valid[form].header)
    refuse(tmp_path / "d", message)


@pytest.mark.parametrize("form", ["blocks", "bitmap"])
def test_a_file_cut_anywhere_is_refused(form, valid, tmp_path):
    whole, path, model = valid[form].bytes, tmp_path / "d", base()
    before = toys.snapshot(model)
    for length in {*range(0, len(whole), 7), *range(len(whole) - 20, len(whole)), *range(12)}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            losia_pro.load_delta(model, path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        losia_pro.load_delta(model, path)
    toys.assert_same(before, toys.snapshot(model))


@pytest.mark.parametrize("form", ["blocks", "bitmap"])
def test_a_damaged_header_is_refused_or_harmless(form, valid, tmp_path):
    """Every byte of the length and header, damaged in turn: an error and no change, or the tuned model."""
    whole, path = bytearray(valid[form].bytes), tmp_path / "d"
    header = 8 + int.from_bytes(whole[:8], "little")
    dice, harmless = random.Random(0), 0
    model, expected = base(), valid[form].tuned.state_dict()
    untouched = copy.deepcopy(model.state_dict())
    for i in range(header):
        byte = dice.choice((whole[i] ^ 1 << dice.randrange(8), dice.randrange(256)))
        path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
        try:
            losia_pro.load_delta(model, path)
        except ValueError:
            toys.equal_bits(model.state_dict(), untouched)
        else:
            toys.equal_bits(model.state_dict(), expected)
            model.load_state_dict(untouched)
            harmless += 1
    assert harmless < header / 2  # in the settings that it records, which loading does not read


def test_what_is_no_delta_is_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "plain")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "pt", {"format": "pt"})
    torch.save({"w": torch.ones(2)}, tmp_path / "torch")
    (tmp_path / "text").write_text("a delta, I swear\n" * 20)
    (tmp_path / "empty").touch()
    for name in ("plain", "pt"):
        refuse(tmp_path / name, "a safetensors file, but not a delta")
    for name in ("torch", "text", "empty"):
        refuse(tmp_path / name, "not a complete safetensors file")


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    refuse(tmp_path / "bomb", "not a complete safetensors file")
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    refuse(tmp_path / "nowhere", "no such delta file", error=FileNotFoundError)
    refuse(tmp_path, "a folder: a delta is one file", error=FileNotFoundError)


BASES = {
    "another seed": (lambda: toys.stack(torch.bfloat16, 1, n_blocks=2, width=WIDTH, hidden=HIDDEN), "other weights"),
    "another dtype": (lambda: base().float(), r"other weights .* in \w+, which this one is not in$"),
    "another shape": (lambda: toys.stack(torch.bfloat16, n_blocks=2, width=HIDDEN, hidden=WIDTH), "other weights"),
    "fewer blocks": (lambda: toys.stack(torch.bfloat16, n_blocks=1, width=WIDTH, hidden=HIDDEN), "linear layers.1.up"),
    "another model": (lambda: nn.Sequential(nn.Linear(3, 3)), "the linear layers.0.up, which this one lacks"),
    "meta": (lambda: base().to("meta"), "layers.0.up is on the meta device; load the model's weights first"),
}  # fmt: skip


@pytest.mark.parametrize(("other", "message"), BASES.values(), ids=BASES)
def test_another_base_is_refused(other, message, valid, tmp_path):
    (tmp_path / "d").write_bytes(valid["blocks"].bytes)
    refuse(tmp_path / "d", message, other())


@pytest.mark.parametrize("name", ["layers.0.up.weight", "layers.1.down.weight", "layers.1.up.bias"])
def test_one_weight_changed_by_one_bit_is_another_base(name, valid, tmp_path):
    (tmp_path / "d").write_bytes(valid["blocks"].bytes)
    model = base()
    model.get_parameter(name).data.view(torch.int16)[..., -1] ^= 1
    refuse(tmp_path / "d", "other weights", model)


def test_a_delta_is_not_applied_twice(valid, tmp_path):
    (tmp_path / "d").write_bytes(valid["bitmap"].bytes)
    model = losia_pro.load_delta(base(), tmp_path / "d")
    refuse(tmp_path / "d", "other weights", model)
