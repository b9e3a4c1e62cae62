"""`subnet_grad` where tokens are split: a second launch adds the parts up."""

from __future__ import annotations

import pytest
import torch
from ops_tools import DTYPES, as_exact_as_pytorch, choose_runs, grad, randn, usable
from torch import Tensor

GROUP = 16


@pytest.fixture(autouse=True)
def triton_is_there():
    usable("subnet_grad", "triton")
    torch.manual_seed(0)


def operands(tokens: int, out: int, runs: int, n_in: int, dtype: torch.dtype = torch.bfloat16):
    dy, x_sub = randn(tokens, out, dtype=dtype), randn(tokens, n_in, dtype=dtype)
    return dy, x_sub, choose_runs(out // GROUP, runs, GROUP)


def product(dy: Tensor, x_sub: Tensor, idx: Tensor) -> Tensor:
    return grad(dy, x_sub, idx, "triton", torch.float32, GROUP)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(8192, 4096, 32, 512), (4097, 1376, 43, 203), (32768, 1024, 8, 128)], ids=str
)
def test_split_sums_are_exact_and_the_same_bits_every_run(sizes, dtype):
    dy, x_sub, idx = operands(*sizes, dtype)
    first = product(dy, x_sub, idx)
    as_exact_as_pytorch(first, dy, x_sub, idx)
    for _ in range(50):
        assert torch.equal(product(dy, x_sub, idx), first)


def hold(*streams: torch.cuda.Stream) -> None:
    """Let what follows on these streams begin together: a launch takes the host longer than the device."""
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # cycles: 10 ms


def test_streams_at_once_have_parts_of_their_own():
    work = [operands(8192, 4096, 32, 512) for _ in range(3)]
    alone = [product(*one) for one in work]
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        hold(*streams)
        together: list[tuple[Tensor, Tensor]] = []
        for _ in range(5):
            for stream, one, expected in zip(streams, work, alone, strict=True):
                with torch.cuda.stream(stream):
                    together.append((product(*one), expected))
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result, expected in together)


def test_a_graph_is_replayed_beside_calls_outside_it():
    one, other = operands(8192, 4096, 32, 512), operands(4096, 1024, 16, 128)
    expected = product(*one), product(*other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(*one), product(*other)
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side, torch.cuda.current_stream(), side):
        for result in captured:
            result.fill_(torch.nan)
        hold(torch.cuda.current_stream(), side)
        with torch.cuda.stream(stream):
            graph.replay()
            own = product(*one), product(*other)
        between = product(*one)
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected)) and all(map(torch.equal, own, expected))
        assert torch.equal(between, expected[0])


def test_compiled_with_cuda_graphs_from_the_first_call_on():
    """The parts are memory of the graph, and of no call outside it."""
    work = operands(8192, 4096, 32, 512)
    compiled = torch.compile(lambda *args: product(*args) * 2, mode="reduce-overhead")
    results = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        results.append(compiled(*work).clone())
    expected = product(*work) * 2
    assert all(torch.equal(result, expected) for result in results)
