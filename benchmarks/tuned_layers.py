"""The layers of the other benchmarks, tuned: what a session brings for each, and what the machine would allow."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tvm_structured as ts
from tvm_structured.roofline import Roofline, measure_roofline
from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.structures import Structure, Unstructured
from tvm_structured.targets import physical_cores, resolve_target
from tvm_structured.tuning.session import Progress, Session, WeightedTask
from tvm_structured.tuning.tasks import KernelTask
from tvm_structured.tuning.workers import LocalMeasurer, Measurer

HEADINGS = ("kernel", "batch", "trials", "by hand us", "tuned us", "faster", "limit", "of it by hand", "tuned")
AT_THE_LIMIT = 1 / 1.10  # of the bound: a hand schedule above cannot become 1.10 times as fast
LEVEL2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


@dataclass(frozen=True)
class Layer:
    """A dense layer of (out, inner), or a convolution of square images (in, out, kernel, size of the image)."""

    family: str
    size: Mapping[str, Any]
    shape: tuple[int, int] = (4096, 4096)
    conv: tuple[int, int, int, int] | None = None


TRAIN = {"out_modes": (16, 16, 16), "in_modes": (16, 16, 16)}
LAYERS: dict[str, Layer] = {
    "dense 1024x1024": Layer("dense", {}, (1024, 1024)),
    "dense": Layer("dense", {}),
    **{f"block-circulant {n}": Layer("block_circulant", {"block": n}) for n in (8, 16, 64)},
    **{f"permuted-diagonal {p}": Layer("permuted_diagonal", {"block": p}) for p in (8, 16)},
    "permuted-diagonal 8, natural": Layer("permuted_diagonal", {"block": 8, "indexing": "natural"}),
    **{f"tensor-train 16^3 rank {r}": Layer("tensor_train", {**TRAIN, "rank": r}) for r in (4, 8)},
    "low rank N/8": Layer("low_rank", {"rank": 512}),
    "winograd 4 64->64 @ 56": Layer("winograd", {"tile": 4}, conv=(64, 64, 3, 56)),
    "winograd 4 256->256 @ 14": Layer("winograd", {"tile": 4}, conv=(256, 256, 3, 14)),
    "1x1 256->64 @ 56": Layer("conv2d", {}, conv=(256, 64, 1, 56)),
    "1x1 512->128 @ 28": Layer("conv2d", {}, conv=(512, 128, 1, 28)),
    "1x1 1024->256 @ 14": Layer("conv2d", {}, conv=(1024, 256, 1, 14)),
}
QUICK = ("dense 1024x1024", "block-circulant 16", "1x1 512->128 @ 28")
PLAIN = ("dense", "conv2d")  # kernels without a structure


def highest_roofline(times: int = 3) -> Roofline:
    """Of several, each value by itself: what else the processor does only makes them lower."""
    return Roofline.highest(measure_roofline() for _ in range(times))


def tune_layers(
    names: Sequence[str],
    batches: Sequence[int],
    trials: int,
    folder: Path,
    seconds: float,
    machine: Roofline,
    done: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """One row for each layer and batch; done(row) as soon as it is there. Each layer has an equal share of the seconds
    that are left: what one does not need is for the next ones."""
    target, rows, deadline = resolve_target("host"), [], time.monotonic() + seconds
    database = ts.Database(folder, must_exist=False)
    measurer = LocalMeasurer(int(target.attrs["num-cores"]))
    cases = list(itertools.product(batches, names))
    try:
        with database.locked():
            for index, (batch, name) in enumerate(cases):
                task = task_of(LAYERS[name], batch, target)
                share = max(0.0, deadline - time.monotonic()) / (len(cases) - index)
                tuned = tune_task(task, database, measurer, trials, share)
                if tuned.best:
                    rows.append(row_of(name, batch, tuned, machine))
                    done(rows[-1])
    finally:
        measurer.close()
    return rows


def tune_task(task: KernelTask, database: ts.Database, measurer: Measurer, trials: int, seconds: float) -> Progress:
    """A session of one task. Where its time ends first, the best so far meets the hand schedule; it may go on later."""
    weighted = [WeightedTask(task)]
    (progress,) = Session(weighted, database, measurer, trials, time_budget=seconds).run()
    compared = progress.best.trials if progress.best else 0
    if compared < len(progress.trials):
        (progress,) = Session(weighted, database, measurer, len(progress.trials)).run()
    return progress


def task_of(layer: Layer, batch: int, target: Any) -> KernelTask:
    """The kernel with a bias and a ReLU; convolutions in blocks of channels, as inside a network."""
    cpu, epilogue = Cpu.of(target), Epilogue(bias=True, activation="relu")
    structure = member_of(layer)
    if layer.conv is None:
        out, inner = layer.shape
        site = Site((batch, inner), (batch, out), cpu, epilogue)
        return KernelTask.of(KERNELS[layer.family], structure, site, target)
    inner, out, kernel, image = layer.conv
    pad = kernel // 2
    conv = ConvGeometry((kernel, kernel), padding=(pad,) * 4)
    shapes = (batch, inner, image, image), (batch, out, image, image)
    return KernelTask.of(KERNELS[layer.family], structure, Site(*shapes, cpu, epilogue, conv, True, True), target)


def member_of(layer: Layer) -> Structure:
    """A random member of the family."""
    rng = np.random.default_rng(0)
    if layer.conv is not None:
        inner, out, kernel, image = layer.conv
        weight = rng.standard_normal((out, inner, kernel, kernel), dtype=np.float32)
        whole: Any = ts.Conv2d("w", weight, padding=(kernel // 2,) * 4, input_hw=(image, image))
    else:
        whole = ts.Dense("w", rng.standard_normal(layer.shape, dtype=np.float32))
    if layer.family == "tensor_train":  # by its cores: decomposing a random matrix would take longer than the tuning
        ranks = [1, layer.size["rank"], layer.size["rank"], 1]
        modes = zip(layer.size["out_modes"], layer.size["in_modes"], strict=True)
        cores = [
            rng.standard_normal((ranks[k], o, i, ranks[k + 1]), dtype=np.float32) for k, (o, i) in enumerate(modes)
        ]
        sizes = {"shape": layer.shape, **{name: layer.size[name] for name in ("out_modes", "in_modes")}}
        return ts.STRUCTURES["tensor_train"].from_factors(sizes, cores)
    if layer.family == "low_rank":
        rank = layer.size["rank"]
        factors = [
            rng.standard_normal(shape, dtype=np.float32) for shape in ((layer.shape[0], rank), (rank, layer.shape[1]))
        ]
        return ts.STRUCTURES["low_rank"].from_factors({"shape": layer.shape}, factors)
    family = Unstructured if layer.family in PLAIN else ts.STRUCTURES[layer.family]
    return family.from_dense(whole, **layer.size)


def row_of(name: str, batch: int, done: Progress, machine: Roofline) -> dict[str, Any]:
    """`limit`: what bounds the layer on this machine. `bounds`: shares of it that hand schedule and winner reach."""
    assert done.best is not None and isinstance(done.weighted.task, KernelTask)
    task, times = done.weighted.task, (done.best.default_seconds, done.best.seconds)
    limit, bound = limit_of(machine, *work_of(task, batch))
    return {
        "tuned_layer": name,
        "kernel": task.kernel,
        "batch": batch,
        "trials": len(done.trials),
        "space": len(task.space),
        "default_seconds": times[0],
        "seconds": times[1],
        "default_config": task.space[0],
        "config": done.best.config,
        "limit": limit,
        "bounds": [bound / seconds for seconds in times],
    }


def work_of(task: KernelTask, batch: int) -> tuple[float, float]:
    """(operations, bytes of weights, input and output)."""
    x, y = ([extent or batch for extent in shape] for shape in (task.x_shape, task.y_shape))
    return task.structure.flops(batch * math.prod(y[2:])), task.structure.num_bytes + 4 * (math.prod(x) + math.prod(y))


def limit_of(machine: Roofline, flops: float, moved: float) -> tuple[str, float]:
    """(what takes longest, its seconds). Bytes that stay next to the cores from call to call are no limit."""
    arithmetic, bound = flops / machine.peak_flops, machine.bound(flops, moved)
    if moved <= level2() * physical_cores() or arithmetic >= bound:
        return "FLOPs", arithmetic
    return "cache bytes" if machine.in_cache(moved) else "memory bytes", bound


def level2() -> int:
    """Bytes of a core's level-2 cache, 0 where the system does not tell."""
    text = LEVEL2.read_text(encoding="ascii").strip() if LEVEL2.is_file() else ""
    return 1024 * int(text[:-1]) if text.endswith("K") and text[:-1].isdigit() else 0


def cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[name] * 1e6:,.1f}" for name in ("default_seconds", "seconds")]
    bounds = [f"{bound:.0%}" for bound in row["bounds"]]
    trials = f"{row['trials']}{' (all)' if row['trials'] == row['space'] else ''}"
    return [row["tuned_layer"], str(row["batch"]), trials, *times, f"{ratio(row):.2f}", row["limit"], *bounds]


def ratio(row: Mapping[str, Any]) -> float:
    return float(row["default_seconds"] / row["seconds"])


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Geometric means, and which hand schedules left nothing to find."""
    lines = []
    structured = [row for row in rows if row["kernel"] not in PLAIN]
    for what, chosen in (
        ("structured kernels", structured),
        ("those whose hand schedule is not at the limit", [row for row in structured if not is_at_the_limit(row)]),
        ("plain dense and 1x1 convolutions", [row for row in rows if row["kernel"] in PLAIN]),
    ):
        if chosen:
            mean = math.exp(np.mean([math.log(ratio(row)) for row in chosen]))
            slower = sum(ratio(row) < 1 for row in chosen)
            count = f"{len(chosen)} rows, {slower} slower"
            lines.append(f"{what}: geometric mean {mean:.2f}x of the hand schedules ({count})")
    for row in filter(is_at_the_limit, rows):
        name = f"{row['tuned_layer']}, batch {row['batch']}"
        times = 1 / row["bounds"][0]
        lines.append(f"{name}: at the limit, {times:.2f} times what the {row['limit']} take at least")
    return lines


def is_at_the_limit(row: Mapping[str, Any]) -> bool:
    return bool(row["bounds"][0] >= AT_THE_LIMIT)
