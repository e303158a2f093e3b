"""Timing on a GPU: CUDA graphs of calls that never find their weights in the cache, and what the card can reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
TURNS = 5
TURN_SECONDS = 3e-3


@dataclass(frozen=True)
class Card:
    """Measured in this run: bytes a second of a copy (read and written), operations a second of large products."""

    name: str
    bandwidth: float
    flops: dict[str, float]
    l2_bytes: int


def measure_card() -> Card:
    properties = torch.cuda.get_device_properties(0)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # a kernel, as ours are: within a graph `copy_` becomes a node for the copy engine, which is slower
    copy = 2 * source.nbytes / seconds_of({"copy": [lambda: torch.mul(source, 1.0, out=target)]})["copy"]
    flops = {}
    for dtype, n in ((torch.float16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = seconds_of({"product": [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]})["product"]
        flops[str(dtype).removeprefix("torch.")] = 2 * n**3 / product
    return Card(properties.name, copy, flops, properties.L2_cache_size)


def copies_for(num_bytes: int, card_l2: int) -> int:
    """So many sets of weights that each has left the cache when its turn comes again."""
    return max(2, min(64, -(-2 * card_l2 // max(num_bytes, 1))))


def seconds_of(contenders: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """Median seconds of one call of each contender, whose calls (one for each set of weights) are one CUDA graph."""
    graphs = {name: graph_of(calls) for name, calls in contenders.items()}
    rounds = {name: max(1, int(TURN_SECONDS / max(replay(graph, 1), 1e-7))) for name, graph in graphs.items()}
    turns: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            turns[name].append(replay(graph, rounds[name]) / len(contenders[name]))
    return {name: statistics.median(values) for name, values in turns.items()}


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Seconds of one replay, of `count`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count
