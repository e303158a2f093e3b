"""What compiling costs: whole networks from an empty and a filled cost store, memory, and every kernel by itself.

    python benchmarks/bench_compile.py [--model resnet50] [--layers] [--quick] [--json out.json]

Networks are compiled in a process of their own. A kernel's time is that of `tvm.compile` for its function alone, from
scheduled TensorIR to machine code; `--layers` adds the kernels of `bench_layers.py`, every form and batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import tvm
from bench_layers import FORMS, layer
from children import compile_twice, in_child
from measuring import describe_machine, print_table, write_json
from networks import NETWORKS, network
from tvm import tirx

import tvm_structured as ts
from tvm_structured.targets import resolve_target

LIMIT = 1800.0  # seconds for one network
QUICK_MODELS, QUICK_FORMS = ("resnet18",), ("dense", "block-circulant 16")
BATCHES = (1, 16, 128)
HEADINGS = ("network", "empty store s", "filled store s", "weights MB", "before MB", "peak MB", "kernels", "slowest s")


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(NETWORKS)), help="Networks [default: all].")
@click.option("--layers", is_flag=True, help="Also every kernel of bench_layers.py.")
@click.option("--quick", is_flag=True, help="One network; two forms of a layer, batch 1.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(models: Sequence[str], layers: bool, quick: bool, path: Path | None) -> None:
    """Print the tables."""
    machine, rows = describe_machine(), []
    for model in models or (QUICK_MODELS if quick else list(NETWORKS)):
        stats = in_child(compile_twice, model, 1, limit=LIMIT)
        rows.append({"network": model, **stats, **in_child(kernels_of_network, model, limit=LIMIT)})
        write_json(path, rows)
    print_table(f"ts.compile at batch 1: {machine}", HEADINGS, [cells(row) for row in rows], [*map(slowest, rows)])
    if not layers:
        return
    forms = QUICK_FORMS if quick else tuple(FORMS)
    rows += [layer_kernels(form, batch) for form in forms for batch in (BATCHES[:1] if quick else BATCHES)]
    write_json(path, rows)
    table = [[row["layer"], str(row["batch"]), f"{max(row['kernels'].values()):.2f}"] for row in rows if "layer" in row]
    print_table("kernels of layers", ("layer", "batch", "slowest s"), table)


def kernels_of_network(model: str) -> dict[str, Any]:
    return {"kernels": kernel_seconds(ts.compile(*in_tuple(network(model, 1)), target="host"))}


def in_tuple(model_and_input: tuple[Any, Any]) -> tuple[Any, tuple[Any]]:
    module, x = model_and_input
    return module, (x,)


def layer_kernels(name: str, batch: int) -> dict[str, Any]:
    """One row: seconds of every kernel of a layer of `bench_layers.py`."""
    module, x, plan = layer(FORMS[name], batch)
    return {"layer": name, "batch": batch, "kernels": kernel_seconds(ts.compile(module, (x,), "host", plan=plan))}


def kernel_seconds(compiled: ts.Compiled) -> dict[str, float]:
    """Seconds from scheduled TensorIR to machine code, by the kernel's name in the lowered module."""
    target = resolve_target("host")
    seconds = {}
    for variable, function in compiled.mod.functions_items():
        if isinstance(function, tirx.PrimFunc):
            start = time.perf_counter()
            tvm.compile(function.with_attr("global_symbol", variable.name_hint), target)
            seconds[variable.name_hint] = time.perf_counter() - start
    return seconds


def cells(row: dict[str, Any]) -> list[str]:
    measured = ("cold_seconds", "warm_seconds", "weights_mb", "before_mb", "peak_mb")
    numbers = [f"{row[name]:.1f}" if name.endswith("seconds") else f"{row[name]:,.0f}" for name in measured]
    return [row["network"], *numbers, str(len(row["kernels"])), f"{max(row['kernels'].values()):.2f}"]


def slowest(row: dict[str, Any]) -> str:
    name = max(row["kernels"], key=row["kernels"].__getitem__)
    return f"- {row['network']}: {name} takes longest"


if __name__ == "__main__":
    main()
