"""Forward and backward of one structured layer against the dense one, and against forming its dense weight each time.

    python benchmarks/bench_training.py [--quick] [--batch N] [--cpu-time] [--json training.json]

The shapes are those of VGG-16's dense layers. `expand` is what most implementations do: W(factors), then a dense
product, whose gradient flows back through W. Times are medians of turns in one process; without an optimiser, which
would only add to the dense layer's time. With --cpu-time it is processor time of one thread, which means something on a
machine that others use, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from measuring import Timing, describe_machine, milliseconds, print_table, write_json
from torch import Tensor
from torch.nn import functional as F

from tvm_structured.nn import StructuredLinear
from tvm_structured.targets import physical_cores

Clock = Callable[[], float]
LAYERS = {"fc6": (4096, 25088), "fc7": (4096, 4096)}
TRAINS = {
    "fc6": {"out_modes": (4, 4, 4, 4, 4, 4), "in_modes": (2, 7, 8, 8, 7, 4), "rank": 4},
    "fc7": {"out_modes": (16, 16, 16), "in_modes": (16, 16, 16), "rank": 8},
}
FORMS: dict[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    **{f"block-circulant {n}": lambda _, n=n: ("block_circulant", {"block": n}) for n in (8, 16)},
    **{f"permuted-diagonal {p}": lambda _, p=p: ("permuted_diagonal", {"block": p}) for p in (8, 10)},
    "tensor-train": lambda layer: ("tensor_train", TRAINS[layer]),
    "low-rank 256": lambda _: ("low_rank", {"rank": 256}),
}
HEADINGS = ("form", "batch", "dense", "expand", "ours", "x dense", "x expand", "parameters")


@click.command()
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes [default: 16 128].")
@click.option("--layer", "layers", multiple=True, type=click.Choice(list(LAYERS)), help="Only these layers.")
@click.option("--cpu-time", is_flag=True, help="One thread, and its processor time instead of the clock's.")
@click.option("--quick", is_flag=True, help="The smaller layer, one batch, few rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(batches: tuple[int, ...], layers: tuple[str, ...], cpu_time: bool, quick: bool, path: Path | None) -> None:
    """Print the table."""
    torch.set_num_threads(1 if cpu_time else physical_cores())
    clock = time.process_time if cpu_time else time.perf_counter
    rows = []
    for layer in layers or (("fc7",) if quick else tuple(LAYERS)):
        for batch in batches or ((16,) if quick else (16, 128)):
            for name in FORMS:
                rows.append(measure(name, layer, batch, 3, clock))
                write_json(path, rows)
    kind = "milliseconds of one thread's processor time" if cpu_time else "milliseconds"
    print_table(f"{kind}, forward and backward: {describe_machine()}", HEADINGS, [cells(row) for row in rows])


def measure(name: str, layer: str, batch: int, rounds: int, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """One row; the gradients of both ways to compute the layer are compared first."""
    out, inner = LAYERS[layer]
    family, size = FORMS[name](layer)
    torch.manual_seed(0)
    module = StructuredLinear(inner, out, family, **size)
    dense = torch.nn.Linear(inner, out)
    x, upstream = torch.randn(batch, inner, requires_grad=True), torch.randn(batch, out)

    def expanded(x: Tensor) -> Tensor:
        return F.linear(x, module.dense_weight(), module.bias)

    calls = {
        "dense": step(dense, x, upstream),
        "expand": step(expanded, x, upstream),
        "ours": step(module, x, upstream),
    }
    names = list(module.parameters())
    found, expected = (torch.autograd.grad(f(x), names, upstream) for f in (module, expanded))
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if not error < 1e-4:
        raise click.ClickException(f"{name}, {layer}: the gradients differ by {error:.1e}")
    times = in_turns(calls, rounds, clock)
    return {
        "layer": f"{layer} {name}",
        "batch": batch,
        "times": {who: {"seconds": timing.seconds, "spread": timing.spread} for who, timing in times.items()},
        "parameters": sum(p.numel() for p in module.parameters()),
        "error": error,
    }


def step(layer: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], Any]:
    """Forward and backward; gradients are computed anew, as after `zero_grad`."""
    parameters = list(layer.parameters()) if isinstance(layer, torch.nn.Module) else []

    def run() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        layer(x).backward(upstream)

    return run


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, Timing]:
    """One call of each to a turn, after one that is not counted: they take up to seconds."""
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = clock()
            call()
            turns[name].append(clock() - start)
    return {name: Timing.of(seconds) for name, seconds in turns.items()}


def cells(row: dict[str, Any]) -> list[str]:
    times = {who: Timing(**values) for who, values in row["times"].items()}
    ratios = [f"{times[who].seconds / times['ours'].seconds:.2f}" for who in ("dense", "expand")]
    texts = [milliseconds(times[who]) for who in ("dense", "expand", "ours")]
    return [row["layer"], str(row["batch"]), *texts, *ratios, f"{row['parameters']:,}"]


if __name__ == "__main__":
    main()
