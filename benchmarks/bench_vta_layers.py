"""Modelled cycles of layers on the accelerator: virtual threads, structured against dense, default against tuned.

    python benchmarks/bench_vta_layers.py [--quick] [--trials N] [--json FILE]

Nothing is timed: the cycles come from the timing model (`tvm_structured.vta.timing`), with the default configuration
(batch 1, 16 x 16 int8 tiles, a 64-bit port, bursts of 256 beats unless the column says 16). Weights are random.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import print_table, write_json
from rich.progress import track

from tvm_structured.structures import BlockCirculant, PermutedDiagonal
from tvm_structured.structures.tt_order import Order, core_matrix, first_core_first, last_core_first
from tvm_structured.vta import VTAConfig
from tvm_structured.vta.lower import Lowered, lower
from tvm_structured.vta.operators import (
    Int8AvgPool,
    Int8BlockDiagonal,
    Int8Chain,
    Int8Conv2d,
    Int8Dense,
    Int8MaxPool,
    Int8StructuredDense,
    Joined,
    Operator,
    Requantize,
)
from tvm_structured.vta.timing import Timing, TimingModel, model
from tvm_structured.vta.tuning import tune

CONFIG = VTAConfig()
SHORT_BURSTS = TimingModel(burst_beats=16)
TT_LAYERS = {  # TIE, table 4: out modes, in modes; all ranks 4
    "FC6": ((4,) * 6, (2, 7, 8, 8, 7, 4)),
    "FC7": ((4,) * 6, (4,) * 6),
}
WIDE_TT = {"FC7": ((8, 8, 8, 8), (8, 8, 8, 8))}  # of FC6 it has more tiles than lowering gets through in minutes
RESNET = [  # name, times, channels in, size, channels out, kernel, stride, residual
    ("stem, on patches", 1, 147, 112, 64, 1, 1, False),  # 7x7 / 2 on 3 channels, which takes 3 times as long
    ("C2 3x3", 2, 64, 56, 64, 3, 1, False),
    ("C2 3x3 + residual", 2, 64, 56, 64, 3, 1, True),
    ("C3 3x3 / 2", 1, 64, 56, 128, 3, 2, False),
    ("C3 1x1 / 2", 1, 64, 56, 128, 1, 2, False),
    ("C3 3x3", 1, 128, 28, 128, 3, 1, False),
    ("C3 3x3 + residual", 2, 128, 28, 128, 3, 1, True),
    ("C4 3x3 / 2", 1, 128, 28, 256, 3, 2, False),
    ("C4 1x1 / 2", 1, 128, 28, 256, 1, 2, False),
    ("C4 3x3", 1, 256, 14, 256, 3, 1, False),
    ("C4 3x3 + residual", 2, 256, 14, 256, 3, 1, True),
    ("C5 3x3 / 2", 1, 256, 14, 512, 3, 2, False),
    ("C5 1x1 / 2", 1, 256, 14, 512, 1, 2, False),
    ("C5 3x3", 1, 512, 7, 512, 3, 1, False),
    ("C5 3x3 + residual", 2, 512, 7, 512, 3, 1, True),
]
rng = np.random.default_rng(0)


def int8(*shape: int) -> np.ndarray:
    return rng.integers(-100, 101, shape).astype(np.int8)


def bias(count: int) -> np.ndarray:
    return rng.integers(-9999, 10000, count).astype(np.int32)


def per_channel(count: int) -> Requantize:
    """What our quantisation by channel makes: a multiplier for each, a shift, a clip; the rounding is in the bias."""
    return Requantize(0, rng.integers(4, 8, count).astype(np.int32), 15, 0, rounds=False)


def conv(inner: int, out: int, kernel: int, stride: int, requantize: Requantize, residual: bool = False) -> Int8Conv2d:
    return Int8Conv2d(
        int8(out, inner, kernel, kernel), bias(out), requantize, Joined(77, 6) if residual else None, "conv",
        (stride, stride), (kernel // 2,) * 4,
    )  # fmt: skip


def percent(timing: Timing) -> str:
    return f"{100 * timing.gemm_utilisation:.1f} %"


def thread_rows() -> list[dict[str, Any]]:
    """The 3x3 layers of ResNet-18 with one tile on chip at a time, and with two virtual threads; without a residual and
    with one."""
    rows = []
    for stage, channels, size in [("C2", 64, 56), ("C3", 128, 28), ("C4", 256, 14), ("C5", 512, 7)]:
        by_channel = per_channel(channels)
        for how, requantize, residual in [
            ("shift", Requantize(shift=10, low=0), False),
            ("by channel", by_channel, False),
            ("by channel, residual", by_channel, True),
        ]:
            layer = conv(channels, channels, 3, 1, requantize, residual)
            shapes = [(1, channels, size, size)] * layer.num_inputs
            one, two = (lower(layer, shapes, CONFIG, threads=threads).program for threads in (1, 2))
            rows.append({"layer": f"{stage} {size}x{size}x{channels}", "requantize": how, "one": model(one),
                         "two": model(two), "short": model(two, SHORT_BURSTS)})  # fmt: skip
    return rows


def print_threads(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["layer"], row["requantize"], f"{row['one'].cycles:,}", percent(row["one"]), f"{row['two'].cycles:,}",
         percent(row["two"]), percent(row["short"])]
        for row in rows
    ]  # fmt: skip
    headings = ["3x3 layer", "requantisation", "1 thread", "GEMM", "2 threads", "GEMM", "GEMM, bursts of 16"]
    print_table("Virtual threads, modelled cycles", headings, cells)


def train(out_modes: Sequence[int], in_modes: Sequence[int], rank: int, order_of: Any) -> Int8Chain:
    """A tensor train as a chain of int8 products, in one of the two orders."""
    ranks = (1, *(rank,) * (len(out_modes) - 1), 1)
    order: Order = order_of(out_modes, in_modes, ranks)
    factors = []
    for stage in order.stages:
        core = int8(ranks[stage.core], out_modes[stage.core], in_modes[stage.core], ranks[stage.core + 1])
        matrix = core_matrix(core, order.is_last_core_first)
        before = np.arange(stage.lead * stage.depth * stage.trail).reshape(stage.lead, stage.depth, stage.trail)
        after = np.arange(stage.lead * stage.rows * stage.trail).reshape(stage.lead, stage.trail, stage.rows)
        factors.append(
            Int8BlockDiagonal(
                np.ascontiguousarray(matrix)[None], None, Requantize(shift=7), groups=stage.lead * stage.trail,
                in_order=before.transpose(0, 2, 1).reshape(-1), out_order=after.transpose(0, 2, 1).reshape(-1),
            )
        )  # fmt: skip
    return Int8Chain(tuple(factors), "tensor train")


def ways(name: str, out: int, inner: int) -> dict[str, list[tuple[Operator, int]]]:
    """Layers of that size and their parameters; of several, the one with the fewest cycles counts."""
    q = Requantize(shift=12, low=0)
    found: dict[str, list[tuple[Operator, int]]] = {"dense": [(Int8Dense(int8(out, inner), bias(out), q), out * inner)]}
    trains = [("tensor train, rank 4", TT_LAYERS[name], 4)]
    if name in WIDE_TT:
        trains.append(("tensor train, rank 16", WIDE_TT[name], 16))
    for label, (out_modes, in_modes), rank in trains:
        chains = [train(out_modes, in_modes, rank, order) for order in (last_core_first, first_core_first)]
        found[label] = [(chain, sum(f.weight.size for f in chain.factors)) for chain in chains]
    for n in (16, 64, 128):
        c = int8(out // n, -(-inner // n), n)
        found[f"block-circulant, {n}"] = [
            (Int8StructuredDense(BlockCirculant((out, inner), 1, c), bias(out), q), c.size)
        ]
    for p in (10, 64):
        rows, columns = -(-out // p), -(-inner // p)
        shifts = rng.integers(0, p, (rows, columns))
        structure = PermutedDiagonal((out, inner), 1, int8(rows, columns, p), shifts)
        found[f"permuted diagonal, {p}"] = [(Int8StructuredDense(structure, bias(out), q), rows * columns * p)]
    for rank in (64, 256):
        factors = Int8Dense(int8(rank, inner), None, Requantize(shift=12)), Int8Dense(int8(out, rank), bias(out), q)
        found[f"low rank, {rank}"] = [(Int8Chain(factors, "low rank"), rank * (inner + out))]
    return found


def structured_rows(batches: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, out, inner in [("FC6", 4096, 25088), ("FC7", 4096, 4096)][quick:]:
        for way, candidates in track(ways(name, out, inner).items(), description=name, transient=True):
            for batch in batches:
                made = [(lower(operator, [(batch, inner)], CONFIG), params) for operator, params in candidates]
                timed = [(model(lowered.program), lowered, params) for lowered, params in made]
                timing, lowered, params = min(timed, key=lambda entry: entry[0].cycles)
                rows.append({"layer": f"VGG-16 {name}", "way": way, "batch": batch, "params": params, "timing": timing,
                             "bytes": traffic(lowered), "reason": lowered.reason})  # fmt: skip
    return rows


def traffic(lowered: Lowered) -> int:
    """Bytes loaded and stored."""
    return int(lowered.program.counts[:, :5].sum())


def print_structured(rows: list[dict[str, Any]]) -> None:
    dense = {(row["layer"], row["batch"]): row["timing"].cycles for row in rows if row["way"] == "dense"}
    cells = [
        [row["layer"], str(row["batch"]), row["way"], f"{row['params']:,}", f"{row['timing'].cycles:,}",
         f"{dense[row['layer'], row['batch']] / row['timing'].cycles:.1f}", f"{row['bytes'] / 1e6:.2f}",
         percent(row["timing"]), row["reason"].split(":")[0]]
        for row in rows
    ]  # fmt: skip
    headings = ["layer", "batch", "structure", "params", "cycles", "x dense", "MB moved", "GEMM", "how"]
    print_table("Structured against dense, modelled cycles", headings, cells)


def resnet() -> list[tuple[str, int, Operator, list[tuple[int, ...]]]]:
    found: list[tuple[str, int, Operator, list[tuple[int, ...]]]] = []
    for name, times, inner, size, out, kernel, stride, residual in RESNET:
        layer = conv(inner, out, kernel, stride, per_channel(out), residual)
        shape = (1, inner, size, size)
        output = (1, out, size // stride, size // stride)
        found.append((name, times, layer, [shape, output] if residual else [shape]))
    found.insert(1, ("max pool", 1, Int8MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), [(1, 64, 112, 112)]))
    found.append(("average pool", 1, Int8AvgPool.mean((7, 7)), [(1, 512, 7, 7)]))
    found.append(("fc", 1, Int8Dense(int8(1000, 512), bias(1000), per_channel(1000)), [(1, 512)]))
    return found


def tuned_rows(trials: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, times, operator, shapes in resnet()[: 4 if quick else None]:
        tuned = tune(operator, shapes, CONFIG, trials)
        utilisation = model(lower(operator, shapes, CONFIG, tuned.schedule).program).gemm_utilisation
        rows.append({"layer": name, "times": times, "default": tuned.default_cycles, "tuned": tuned.cycles,
                     "utilisation": utilisation})  # fmt: skip
    return rows


def print_tuned(rows: list[dict[str, Any]]) -> None:
    totals = [sum(row["times"] * row[key] for row in rows) for key in ("default", "tuned")]
    cells = [
        [row["layer"], str(row["times"]), f"{row['default']:,}", f"{row['tuned']:,}",
         f"{row['default'] / row['tuned']:.3f}", f"{100 * row['utilisation']:.1f} %"]
        for row in rows
    ]  # fmt: skip
    cells.append(["total", "", f"{totals[0]:,}", f"{totals[1]:,}", f"{totals[0] / totals[1]:.3f}", ""])
    headings = ["ResNet-18 layer", "times", "default", "tuned", "ratio", "GEMM, tuned"]
    print_table("Default against tuned schedules, modelled cycles", headings, cells)


@click.command()
@click.option("--quick", is_flag=True, help="FC7 with batch 1 only, few layers and trials.")
@click.option("--trials", default=24, show_default=True, help="Schedules that tuning looks at for each layer.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(quick: bool, trials: int, path: Path | None) -> None:
    """Model layers on the accelerator."""
    threads = thread_rows()
    print_threads(threads)
    structured = structured_rows((1,) if quick else (1, 16), quick)
    print_structured(structured)
    tuned = tuned_rows(4 if quick else trials, quick)
    print_tuned(tuned)
    write_json(path, [plain(row) for row in (*threads, *structured, *tuned)])


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Cycles and utilisation in place of a timing."""
    return {
        key: {"cycles": value.cycles, "gemm": value.gemm_utilisation} if isinstance(value, Timing) else value
        for key, value in row.items()
    }


if __name__ == "__main__":
    main()
