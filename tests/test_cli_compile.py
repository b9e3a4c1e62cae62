"""``losia-pro finetune --compile``: what is compiled, by which method, and to the run's end."""

from __future__ import annotations

import pytest
import torch
from cli_tools import PAIRS, finetune, make_model, record, write_lines
from torch import nn

METHODS = ("losia-pro", "losia", "lora", "full")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs without and with the flag; returns both records, the compiled blocks' classes, and for each graph how
    many blocks there were by then. Where the limit of compilations is hit, it fails."""
    blocks, graphs = [], []

    def backend(graph, inputs):
        graphs.append(len(blocks))
        return graph.forward

    def compile(module):
        blocks.append(type(module).__name__)
        original(module, backend=backend)

    def run(*flags):
        # Lengths differ, and the last batch of an epoch is smaller.
        pairs = [{**p, "prompt": "say " * (i < 10) + p["prompt"]} for i, p in enumerate(PAIRS[:25])]
        data = write_lines(tmp_path / "data.jsonl", pairs)
        base = "--model", make_model(tmp_path / "model"), "--data", data
        flags = (*base, "--precision", "fp32", "--batch-size", 7, "--eval-steps", 2, *flags)
        assert finetune(*flags, "--output", tmp_path / "plain") == 0
        assert not blocks
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            assert finetune(*flags, "--compile", "--output", tmp_path / "compiled") == 0
        return record(tmp_path / "plain"), record(tmp_path / "compiled"), blocks, graphs

    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", compile)
    return run


def test_each_method_compiles_the_blocks_and_trains_the_same(run):
    plain, compiled, blocks, graphs = run("--steps", 3, "--compare", ",".join(METHODS[1:]))
    assert blocks == ["LlamaDecoderLayer"] * 2 * len(METHODS)
    assert set(graphs) == {2, 4, 6, 8}  # each method has its own
    assert graphs.count(2) == graphs.count(4)  # and knows of no shape before
    for method in METHODS:
        for figures in ("train", "loss"):
            assert compiled["results"][method][figures] == plain["results"][method][figures]


def test_a_run_with_all_kinds_of_steps_stays_compiled(run):
    graphs = run("--steps", 12, "--period", 2)[3]
    assert len(graphs) > 8  # PyTorch's limit
