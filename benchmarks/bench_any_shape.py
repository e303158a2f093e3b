"""Layers of random shapes and batches, dense and structured, as a user would compile them, against the others.

    python benchmarks/bench_any_shape.py [--seed 0] [--count 40] [--kind conv] [--json out.json]

The other benchmarks show the shapes that kernels were made for; this one looks for those they were not. Every weight
is given as a dense torch module: `ts.compile` detects the structure and the guard decides, nothing is forced. All
that run one layer do so in turns in one process; results are compared with PyTorch. The slowest come first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import Timing, describe_machine, interleaved, microseconds, print_table, relative_error, write_json
from model_peers import NotApplicable, channels_last, eager, onnx_runtime_conv, prepacked, to_numpy
from networks import randomize
from peers import linear_peers
from rich.progress import track
from torch import nn

import tvm_structured as ts
from tvm_structured.targets import physical_cores

TOLERANCE = 1e-4  # relative to the largest output
LARGEST = 3e9  # multiply-adds of one layer: a turn of the slowest takes a fraction of a second
BATCHES = (1, 1, 1, 2, 3, 5, 8, 13, 32, 77, 200)
STRUCTURED: dict[str, dict[str, Sequence[Any]]] = {
    "block_circulant": {"block": (4, 8, 12, 16, 32, 50)},
    "permuted_diagonal": {"block": (3, 4, 8, 10, 16)},
    "low_rank": {"rank": (4, 16, 60)},
}
CONV_PEERS = {"eager": eager, "channels_last": channels_last, "prepacked": prepacked, "ort": onnx_runtime_conv}
HEADINGS = ("layer", "batch", "chosen", "best other", "its us", "ours us", "x best", "error")


def dense(rng: np.random.Generator) -> tuple[str, nn.Module, torch.Tensor]:
    """A linear layer without a structure."""
    out, inner = (int(2 ** rng.uniform(3, 12.3)) for _ in range(2))
    return linear(rng, "dense", rng.standard_normal((out, inner)) / np.sqrt(inner))


def structured(rng: np.random.Generator) -> tuple[str, nn.Module, torch.Tensor]:
    """A linear layer whose weight has a structure, edges cut off where blocks do not divide it."""
    family = str(rng.choice(list(STRUCTURED)))
    size = {name: int(rng.choice(values)) for name, values in STRUCTURED[family].items()}
    shape = tuple(int(2 ** rng.uniform(7, 12.3)) for _ in range(2))
    weight = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
    member = ts.STRUCTURES[family].from_dense(ts.Dense("weight", weight), **size)
    return linear(rng, f"{family} {next(iter(size.values()))}", member.dense())


def linear(rng: np.random.Generator, name: str, weight: np.ndarray) -> tuple[str, nn.Module, torch.Tensor]:
    out, inner = weight.shape
    module = nn.Linear(inner, out, bias=False).eval().requires_grad_(False)
    module.weight.data = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    x = torch.from_numpy(rng.standard_normal((int(rng.choice(BATCHES)), inner)).astype(np.float32)).clone()
    return f"{name} {out}x{inner}", module, x


def conv(rng: np.random.Generator) -> tuple[str, nn.Module, torch.Tensor]:
    """A convolution with bias and ReLU: 1x1 to 7x7, strides, groups, depthwise."""
    kernel, stride = int(rng.choice((1, 1, 3, 3, 3, 5, 7))), int(rng.choice((1, 1, 2)))
    inner, out = (max(1, int(2 ** rng.uniform(1.5, 9.3))) for _ in range(2))
    groups = int(rng.choice((1, 1, 1, 2, 4)))
    if rng.random() < 0.2:
        groups = out = inner  # depthwise
    inner, out = (-(-n // groups) * groups for n in (inner, out))
    image, batch = int(2 ** rng.uniform(2.5, 7.5)), int(rng.choice(BATCHES[:6]))
    image = max(image, kernel)
    layer = nn.Conv2d(inner, out, kernel, stride, kernel // 2, groups=groups).requires_grad_(False)
    randomize(layer, torch.Generator().manual_seed(0))
    x = torch.from_numpy(rng.standard_normal((batch, inner, image, image)).astype(np.float32)).clone()
    marks = f"{f' /{stride}' if stride > 1 else ''}{f' g{groups}' if groups > 1 else ''}"
    return f"{kernel}x{kernel}{marks} {inner}->{out} @ {image}", nn.Sequential(layer, nn.ReLU()).eval(), x


KINDS: dict[str, Callable[..., tuple[str, nn.Module, torch.Tensor]]] = {
    "dense": dense, "structured": structured, "conv": conv,
}  # fmt: skip


def others(module: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    if isinstance(module, nn.Linear):
        calls = linear_peers(module.weight.numpy(), x.numpy())
        del calls["torch.compile"]  # seconds for every shape, and it calls the same library
        return calls
    calls = {}
    for name, make in CONV_PEERS.items():
        try:
            calls[name] = make(module, x)
        except NotApplicable:
            continue
    return calls


def multiply_adds(module: nn.Module, x: torch.Tensor) -> int:
    """Of one run, from shapes alone."""
    layer = module if isinstance(module, nn.Linear) else module[0]  # type: ignore[index]
    return int(copy.deepcopy(layer).to("meta")(x.to("meta")).numel() * layer.weight[0].numel())


@click.command()
@click.option("--seed", default=0, show_default=True, help="Draws the layers.")
@click.option("--count", default=40, show_default=True, help="Layers of each kind.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="[default: all]")
@click.option("--quick", is_flag=True, help="Four layers of each kind.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(seed: int, count: int, kinds: Sequence[str], quick: bool, path: Path | None) -> None:
    """Print the tables."""
    torch.set_num_threads(physical_cores())
    rows: list[dict[str, Any]] = []
    for kind in kinds or KINDS:
        rng = np.random.default_rng(seed)
        found: list[dict[str, Any]] = []
        for _ in track(range(4 if quick else count), description=kind, transient=True):
            name, module, x = KINDS[kind](rng)
            while multiply_adds(module, x) > LARGEST:
                name, module, x = KINDS[kind](rng)
            found.append({"kind": kind, **measure(name, module, x)})
            write_json(path, rows + found)
        rows += found
        show(kind, found)


def measure(name: str, module: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """One row: times of all, what was chosen for us, and our error relative to the largest output."""
    calls = others(module, x)
    compiled = ts.compile(module, (x,), target="host")
    with torch.inference_mode():
        error = relative_error(to_numpy(compiled(x)), module(x).numpy())
    if not error < TOLERANCE:
        raise click.ClickException(f"{name}, batch {len(x)}: relative error {error:.1e}")
    times = interleaved({**calls, "ours": lambda: compiled(x)}, 7)
    (row,) = compiled.report().rows
    return {
        "layer": name,
        "batch": len(x),
        "chosen": row.structure,
        "times": {who: {"seconds": timing.seconds, "spread": timing.spread} for who, timing in times.items()},
        "error": error,
    }


def show(kind: str, rows: list[dict[str, Any]]) -> None:
    cells, ratios = [], []
    for row in rows:
        times = {who: Timing(**values) for who, values in row["times"].items()}
        best = min((who for who in times if who != "ours"), key=lambda who: times[who].seconds)
        ratios.append(times[best].seconds / times["ours"].seconds)
        both = (microseconds(times[best]), microseconds(times["ours"]))
        cells.append(
            [row["layer"], str(row["batch"]), row["chosen"], best, *both, f"{ratios[-1]:.2f}", f"{row['error']:.0e}"]
        )
    order = np.argsort(ratios)
    note = (
        f"x best: geometric mean {np.exp(np.mean(np.log(ratios))):.2f}, lowest {min(ratios):.2f}, "
        f"{sum(ratio < 0.95 for ratio in ratios)} of {len(ratios)} below 0.95"
    )
    print_table(f"{kind}: {describe_machine()}", HEADINGS, [cells[i] for i in order], [note])


if __name__ == "__main__":
    main()
