"""One dense layer in every structured form, through the public API, against PyTorch and ONNX Runtime.

    python benchmarks/bench_layers.py [--quick] [--json out.json]

Each row is a torch.nn.Linear whose weight has the structure; `ts.compile` finds it and compiles it. Times are
medians of turns in one process; the result is compared with PyTorch in the same run.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peers import onnxruntime_linear, torch_call
from rich.console import Console
from rich.table import Table

import tvm_structured as ts
from tvm_structured.metrics import interleaved_medians
from tvm_structured.targets import host_cpu, physical_cores

MODES = {"out_modes": (16, 16, 16), "in_modes": (16, 16, 16)}
FORMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    **{f"block-circulant {n}": ("block_circulant", {"block": n}) for n in (8, 16, 32, 64)},
    **{f"permuted-diagonal {p}": ("permuted_diagonal", {"block": p}) for p in (4, 8, 10, 16)},
    **{f"tensor-train 16^3 rank {r}": ("tensor_train", {**MODES, "rank": r}) for r in (4, 8)},
    "low rank N/8": ("low_rank", {"rank": 512}),
}
TOLERANCE = 1e-4  # relative to the largest output


@click.command()
@click.option("--size", default=4096, show_default=True, help="Inputs and outputs of the layer.")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes [default: 1 16 128].")
@click.option("--quick", is_flag=True, help="Three forms, two batches, few rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(size: int, batches: tuple[int, ...], quick: bool, path: Path | None) -> None:
    """Print the table."""
    torch.set_num_threads(physical_cores())
    batches = batches or ((1, 16) if quick else (1, 16, 128))
    names = list(FORMS)[:3] if quick else list(FORMS)
    title = f"{size} x {size}, fp32, {physical_cores()} threads, {host_cpu()}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "batch", "torch us", "ORT us", "ours us", "x torch", "x ORT", "error"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    rows = []
    for name in names:
        for batch in batches:
            row = measure(name, size, batch, rounds=3 if quick else 7)
            rows.append(row)
            table.add_row(*cells(row))
    Console(width=120).print(table)
    if path is not None:
        path.write_text(json.dumps({"title": title, "machine": platform.processor(), "rows": rows}, indent=2) + "\n")


def measure(name: str, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """One row: seconds of all three, and our largest error relative to the largest output."""
    family, options = FORMS[name]
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
    layer = ts.Dense("weight", weight)
    choice = None if family is None else ts.STRUCTURES[family].from_dense(layer, **options)
    if choice is not None:
        weight = choice.dense().astype(np.float32)
    module = torch.nn.Linear(size, size, bias=False).eval()
    module.weight.data = torch.from_numpy(weight)
    x = rng.standard_normal((batch, size)).astype(np.float32)
    plan = ts.Plan({} if choice is None else {"weight": choice})
    compiled = ts.compile(module, inputs=(torch.from_numpy(x),), target="host", plan=plan)
    expected = torch_call(module, x)().numpy()
    error = float(np.abs(compiled(x) - expected).max() / np.abs(expected).max())
    if not error < TOLERANCE:
        raise click.ClickException(f"{name}, batch {batch}: relative error {error:.1e}")
    seconds = interleaved_medians(
        {
            "torch": torch_call(module, x),
            "ort": onnxruntime_linear(weight, x, physical_cores()),
            "ours": lambda: compiled(x),
        },
        rounds,
    )
    return {"layer": name, "batch": batch, **seconds, "error": error}


def cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row[key] * 1e6:,.0f}" for key in ("torch", "ort", "ours")]
    ratios = [f"{row[key] / row['ours']:.1f}" for key in ("torch", "ort")]
    return [row["layer"], str(row["batch"]), *times, *ratios, f"{row['error']:.0e}"]


if __name__ == "__main__":
    main()
