"""Structured layers on one NVIDIA GPU, against PyTorch: cuBLAS and cuDNN, products of the same factors, torch.compile.

    python benchmarks/bench_gpu.py [--layers 4096x4096] [--batch N] [--dtype float16] [--json out.json]
    python benchmarks/bench_gpu.py --prepare DIR --arch sm_90   # compile only; needs no GPU
    python benchmarks/bench_gpu.py --prebuilt DIR               # measure only; needs TVM's runtime and no compiler

Every call is part of a CUDA graph that goes through so many sets of weights that none is still in the cache. Contenders
take turns, the median counts. Each result is compared with float64 on the GPU, in the same run. Bandwidth and
arithmetic are fractions of what the card was measured to reach in this run: a copy, a large product of the same type.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from gpu_cases import CONVS, MANIFEST, PROJECTIONS, Case, cases, member_of, prepare
from rich import box
from rich.console import Console
from rich.table import Table

HEADINGS = (
    "layer", "form", "batch", "type", "ours us", "torch us", "einsum us", "compiled us",
    "x torch", "x einsum", "x compiled", "of copy", "of peak", "error",
)  # fmt: skip


@click.command()
@click.option("--layers", multiple=True, help="Only these, such as 4096x4096 or 'conv 64->64 @224'.")
@click.option("--batch", "batches", multiple=True, type=int, help="[default: 1 8 64 512]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float16", "float32"]), help="[default: both]")
@click.option("--quick", is_flag=True, help="One small layer, batch 1 and 64, float16.")
@click.option("--form", "forms", multiple=True, help="Only forms that start so.")
@click.option(
    "--configs", default=1, show_default=True, help="Configurations of each kernel to try; the fastest counts."
)
@click.option("--arch", help="Compile for this arch [default: that of the GPU here].")
@click.option("--prepare", "prepared", type=click.Path(path_type=Path), help="Compile into a folder, do not measure.")
@click.option("--prebuilt", type=click.Path(exists=True, path_type=Path), help="Measure what --prepare compiled.")
@click.option("--compile-seconds", default=60.0, show_default=True, help="Time that torch.compile may take in all.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    layers: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    quick: bool,
    configs: int,
    arch: str | None,
    prepared: Path | None,
    prebuilt: Path | None,
    compile_seconds: float,
    path: Path | None,
) -> None:
    """Print the table."""
    if quick:
        layers, batches, dtypes = layers or ("1024x4096",), batches or (1, 64), dtypes or ("float16",)
    every = cases(layers or (*PROJECTIONS, *CONVS), batches or (1, 8, 64, 512), dtypes or ("float16", "float32"))
    wanted = [case for case in every if not forms or case.form.startswith(forms)]
    workers = max(1, len(os.sched_getaffinity(0)))
    if prepared is not None:
        report_failures(prepare(prepared, wanted, arch or "sm_90", configs, workers))
        return
    from tvm_structured.devices import compute_capability, has_gpu

    if not has_gpu():
        raise click.ClickException(
            "no CUDA device here: not measured; compile with --prepare DIR, measure with --prebuilt"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = prebuilt or Path(scratch)
        if prebuilt is None:
            start = time.perf_counter()
            prepare(folder, wanted, arch or f"sm_{compute_capability()}", configs, workers)
            click.echo(f"compiled in {time.perf_counter() - start:.0f} s")
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["entries"]
        measure_all(folder, entries, set(wanted), compile_seconds, path)


def report_failures(entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
        if "error" in entry:
            click.echo(f"{entry['case']}: {entry['error']}")


def measure_all(
    folder: Path, entries: Sequence[dict[str, Any]], wanted: set[Case], compile_seconds: float, path: Path | None
) -> None:
    import torch
    from gpu_measuring import Bench
    from gpu_timing import measure_card

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    bench = Bench(measure_card(), compile_seconds)
    groups: dict[Case, list[dict[str, Any]]] = {}
    for entry in entries:
        case = Case(**entry["case"])
        if case in wanted:
            groups.setdefault(case, []).append(entry)
    rows = []
    for case, group in groups.items():
        rows.append(bench.row(case, member_of(case), folder, group))
        if path is not None:
            path.write_text(json.dumps({"card": describe(bench.card), "rows": rows}, indent=1), encoding="utf-8")
    print_rows(bench.card, rows)


def describe(card: Any) -> dict[str, Any]:
    import torch
    import tvm

    return {
        "gpu": card.name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "tvm": tvm.__version__,
        "copy GB/s": round(card.bandwidth / 1e9),
        **{f"{dtype} TFLOP/s": round(flops / 1e12) for dtype, flops in card.flops.items()},
    }


def print_rows(card: Any, rows: Sequence[dict[str, Any]]) -> None:
    console = Console(width=190)
    console.print(", ".join(f"{key} {value}" for key, value in describe(card).items()))
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index > 1 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for row in rows:
        if row.get("problem"):
            console.print(f"{row['case']}: {row['problem']}", soft_wrap=True, highlight=False, markup=False)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table; `-` for what was not measured."""
    case, times = row["case"], row["times"]
    head = [case["layer"], case["form"], str(case["rows"]), case["dtype"]]
    columns = ("ours", "torch", "einsum", "compiled")
    ours = times.get("ours")
    micros = [f"{times[name] * 1e6:.1f}" if name in times else "-" for name in columns]
    ratios = [f"{times[name] / ours:.2f}" if ours and name in times else "-" for name in columns[1:]]
    if ours is None:
        return [*head, *micros, *ratios, "-", "-", "-"]
    return [*head, *micros, *ratios, f"{row['of_copy']:.0%}", f"{row['of_peak']:.0%}", f"{row['error']:.0e}"]


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
