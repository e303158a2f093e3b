"""Auto-tuning: what it brings, and how fast it is.

    python benchmarks/bench_tuning.py speed [--quick] [--json out.json]
    python benchmarks/bench_tuning.py layers [--quick] [--rows PATTERN] [--batch N] [--trials N] [--work-dir D]

`speed` tunes one function with MetaSchedule's default builder and runner and with a session of ours, both with
MetaSchedule's search, and counts trials a minute. The ranking of each is compared with a careful measurement of the
same candidates. `layers` tunes the kernels of the other benchmarks; a run that was stopped goes on with the same
--work-dir.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import describe_machine, print_table, write_json
from scipy.stats import spearmanr

import tvm_structured as ts
from tvm_structured.roofline import roofline
from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.structures import Structure, Unstructured
from tvm_structured.targets import physical_cores, resolve_target, use_all_cores
from tvm_structured.tuning.schedule_search import install_stand_in, lean_intrinsics
from tvm_structured.tuning.schedule_tasks import ScheduleTask
from tvm_structured.tuning.session import Progress, Session, WeightedTask
from tvm_structured.tuning.tasks import KernelTask, plain
from tvm_structured.tuning.workers import LocalMeasurer

CAREFUL = 25  # rounds of the measurement that the rankings are compared with
CHECKED = 12  # candidates of each ranking
HEADINGS = ("kernel", "batch", "trials", "by hand us", "tuned us", "faster", "of bound by hand", "of bound tuned")


@click.command()
@click.argument("part", type=click.Choice(["speed", "layers"]), default="speed")
@click.option("--rows", "patterns", multiple=True, help="Only layers whose name matches, such as 'tensor*'.")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes of the layers [default: 1 16].")
@click.option("--trials", type=int, help="Trials of our session, for each layer [default: 64].")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keep the database of the layers here.")
@click.option("--quick", is_flag=True, help="Few trials, three layers.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    part: str,
    patterns: Sequence[str],
    batches: Sequence[int],
    trials: int | None,
    work_dir: Path | None,
    quick: bool,
    path: Path | None,
) -> None:
    """Print a table."""
    use_all_cores()
    if part == "speed":
        rows = speed(8, trials or (16 if quick else 64))
        write_json(path, rows)
        headings = ("", "trials", "failed", "seconds", "trials/min", "rank correlation", "best us")
        print_table(f"one task, {describe_machine()}", headings, [speed_cells(row) for row in rows])
        *others, ours = rows
        for other in others:
            if other["per_minute"]:
                print(f"{ours['per_minute'] / other['per_minute']:.1f} times as many trials a minute as {other['who']}")
        spent = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in ours["spent"].items())
        print(f"milliseconds of a trial of ours, by what the processes do: {spent}")
        return
    names = [name for name in (QUICK if quick and not patterns else LAYERS) if matches(name, patterns)]
    if not names:
        raise click.ClickException(f"no layer matches {' '.join(patterns)}; there are {', '.join(LAYERS)}")
    with ExitStack() as stack:
        folder = work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = layers(names, batches or (1, 16), trials or (8 if quick else 64), folder, path)
    print_table(f"tuned layers: {describe_machine()}", HEADINGS, [cells(row) for row in rows], means(rows))


def matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


# -- how fast -------------------------------------------------------------------------------------------


def dense_func(rows: int = 16, out: int = 512, inner: int = 512) -> Any:
    """y = x W^T as plain loops, which have no structured kernel."""
    from tvm import te

    x, weight = te.placeholder((rows, inner), name="x"), te.placeholder((out, inner), name="weight")
    k = te.reduce_axis((0, inner), "k")
    product = te.compute((rows, out), lambda i, j: te.sum(x[i, k] * weight[j, k], axis=k), name="y")
    return te.create_prim_func([x, weight, product], index_dtype_override="int64")


def speed(default_trials: int, our_trials: int) -> list[dict[str, Any]]:
    """Rows for MetaSchedule's default, for that without its slow imports, and for ours. A trial that failed is none."""
    target = resolve_target("host")
    task = ScheduleTask.of(dense_func(), target, name="dense")
    measurer = LocalMeasurer(int(target.attrs["num-cores"]))
    try:
        ours = run_ours(task, measurer, our_trials)
        cured = {"builder": cured_builder(), "runner": "local"}
        rows = [
            run_default("MetaSchedule, default builder and runner", task, default_trials, {}),
            run_default("the same, imports of its workers cured", task, our_trials // 2, cured),
            ours,
        ]
        for row in rows:
            known = [trial for trial in row["candidates"] if trial[1] is not None and trial[1] < 1]
            row["correlation"] = rank_correlation(task, measurer, known)
            row["best"] = min((seconds for _, seconds in known), default=None)
            del row["candidates"]
    finally:
        measurer.close()
    return rows


def cured_builder() -> Any:
    """The local builder, whose processes import the intrinsics of x86 only."""
    from tvm.s_tir import meta_schedule as ms

    return ms.builder.LocalBuilder(max_workers=physical_cores(), initializer=install_stand_in)


def run_default(who: str, task: ScheduleTask, trials: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """MetaSchedule's own loop, xgboost and evolutionary search; without options all as it comes."""
    from tvm.s_tir import meta_schedule as ms

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with lean_intrinsics():  # half a minute less in this process; its workers do without
            database = ms.tune_tir(
                task.module,
                task.tvm_target,
                folder,
                trials,
                num_trials_per_iter=8,
                seed=1,
                space=plain_space(),
                **options,
            )
        seconds = time.perf_counter() - start
        records = database.get_all_tuning_records()
    candidates = [
        ({"trace": plain(r.trace.as_json())}, float(np.mean([float(s) for s in r.run_secs]))) for r in records
    ]
    failed = sum(seconds > 1 for _, seconds in candidates)
    return result(who, len(records), failed, seconds, candidates)


def plain_space() -> Any:
    """The default rules for x86, less VNNI (see `schedule_search`)."""
    from tvm.s_tir import meta_schedule as ms

    return ms.space_generator.PostOrderApply(sch_rules="llvm", postprocs="llvm", mutator_probs="llvm")


def run_ours(task: ScheduleTask, measurer: LocalMeasurer, trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        database = ts.Database(folder, must_exist=False)
        start = time.perf_counter()
        (progress,) = Session([WeightedTask(task)], database, measurer, trials, seed=1).run()
        seconds = time.perf_counter() - start
    found = [(trial.config, trial.seconds) for trial in progress.trials]
    failed = sum(trial.seconds is None for trial in progress.trials)
    spent = {name: value / len(found) for name, value in measurer.spent.items()}
    return result("a session of ours", len(found), failed, seconds, found) | {"spent": spent}


def result(who: str, trials: int, failed: int, seconds: float, candidates: Sequence[Any]) -> dict[str, Any]:
    good = trials - failed
    return {
        "who": who,
        "trials": trials,
        "failed": failed,
        "seconds": seconds,
        "per_minute": 60 * good / seconds,
        "candidates": candidates,
    }


def rank_correlation(task: ScheduleTask, measurer: LocalMeasurer, trials: Sequence[tuple[Any, float]]) -> float | None:
    """Spearman's, between the times of the search and careful ones of the same candidates, spread over all ranks."""
    ranked = sorted(trials, key=lambda trial: trial[1])
    places = sorted({round(place) for place in np.linspace(0, len(ranked) - 1, CHECKED)}) if ranked else []
    picked = [ranked[place] for place in places]
    turns = measurer.compare(task, [config for config, _ in picked], CAREFUL) if len(picked) > 2 else None
    if turns is None:
        return None
    return float(spearmanr([seconds for _, seconds in picked], np.median(turns, axis=1)).statistic)


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    correlation = "-" if row["correlation"] is None else f"{row['correlation']:.2f}"
    best = "-" if row["best"] is None else f"{row['best'] * 1e6:.1f}"
    numbers = [str(row["trials"]), str(row["failed"]), f"{row['seconds']:.0f}", f"{row['per_minute']:.0f}"]
    return [row["who"], *numbers, correlation, best]


# -- what it brings -------------------------------------------------------------------------------------


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


def layers(
    names: Sequence[str], batches: Sequence[int], trials: int, folder: Path, path: Path | None
) -> list[dict[str, Any]]:
    """One row for each layer and batch, written as soon as it is there."""
    target, rows = resolve_target("host"), []
    database = ts.Database(folder, must_exist=False)
    measurer = LocalMeasurer(int(target.attrs["num-cores"]))
    try:
        with database.locked():
            for batch, name in itertools.product(batches, names):
                task = WeightedTask(task_of(LAYERS[name], batch, target))
                (done,) = Session([task], database, measurer, trials).run()
                if done.best:
                    rows.append(row_of(name, batch, done))
                    write_json(path, rows)
    finally:
        measurer.close()
    return rows


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


def row_of(name: str, batch: int, done: Progress) -> dict[str, Any]:
    assert done.best is not None and isinstance(done.weighted.task, KernelTask)
    task, machine = done.weighted.task, roofline()
    y = task.y_shape
    rows = batch * math.prod(extent or 1 for extent in y[2:])
    moved = task.structure.num_bytes + 4 * (
        math.prod(e or batch for e in task.x_shape) + math.prod(e or batch for e in y)
    )
    flops = task.structure.flops(rows)
    bounds = [
        machine.fraction_of_bound(flops, moved, s) if machine else None
        for s in (done.best.default_seconds, done.best.seconds)
    ]
    return {
        "tuned_layer": name,
        "kernel": task.kernel,
        "batch": batch,
        "trials": len(done.trials),
        "default_seconds": done.best.default_seconds,
        "seconds": done.best.seconds,
        "config": done.best.config,
        "bounds": bounds,
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[name] * 1e6:,.1f}" for name in ("default_seconds", "seconds")]
    bounds = ["-" if bound is None else f"{bound:.0%}" for bound in row["bounds"]]
    ratio = f"{row['default_seconds'] / row['seconds']:.2f}"
    return [row["tuned_layer"], str(row["batch"]), str(row["trials"]), *times, ratio, *bounds]


def means(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Geometric means, of the structured kernels and of the plain ones."""
    notes = []
    for what, chosen in (
        ("structured kernels", [row for row in rows if row["kernel"] not in PLAIN]),
        ("plain dense and 1x1 convolutions", [row for row in rows if row["kernel"] in PLAIN]),
    ):
        if chosen:
            ratios = [row["default_seconds"] / row["seconds"] for row in chosen]
            notes.append(f"{what}: geometric mean {math.exp(np.mean(np.log(ratios))):.2f}x of the hand schedules")
    return notes


if __name__ == "__main__":
    main()
