"""Auto-tuning: what it brings, and how fast it is.

    python benchmarks/bench_tuning.py speed [--quick] [--json out.json]
    python benchmarks/bench_tuning.py layers [--quick] [--rows PATTERN] [--batch N] [--trials N] [--work-dir D]
        [--minutes M]

`speed` tunes one function with MetaSchedule's default builder and runner and with a session of ours, both with
MetaSchedule's search, and counts trials a minute. The ranking of each is compared with a careful measurement of the
same candidates. `layers` tunes the kernels of the other benchmarks and prints each when it is done: times of hand
schedule and winner in turns, and what share of the machine's bound they reach. A run that was stopped, or ended before
all trials were made, goes on with the same --work-dir.
"""

from __future__ import annotations

import fnmatch
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import describe_machine, print_table, write_json
from scipy.stats import spearmanr
from tuned_layers import HEADINGS, LAYERS, QUICK, cells, highest_roofline, notes, tune_layers

import tvm_structured as ts
from tvm_structured.targets import physical_cores, resolve_target, use_all_cores
from tvm_structured.tuning.schedule_search import install_stand_in, lean_intrinsics
from tvm_structured.tuning.schedule_tasks import ScheduleTask
from tvm_structured.tuning.session import Session, WeightedTask
from tvm_structured.tuning.tasks import plain
from tvm_structured.tuning.workers import LocalMeasurer

CAREFUL = 25  # rounds of the measurement that the rankings are compared with
CHECKED = 12  # candidates of each ranking
MINUTES = 30.0  # for all layers together


@click.command()
@click.argument("part", type=click.Choice(["speed", "layers"]), default="speed")
@click.option("--rows", "patterns", multiple=True, help="Only layers whose name matches, such as 'tensor*'.")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes of the layers [default: 1 16].")
@click.option("--trials", type=int, help="Trials of our session, for each layer [default: 64].")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keep the database of the layers here.")
@click.option("--minutes", default=MINUTES, show_default=True, help="No new trials of layers after so long.")
@click.option("--quick", is_flag=True, help="Few trials, three layers.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    part: str,
    patterns: Sequence[str],
    batches: Sequence[int],
    trials: int | None,
    work_dir: Path | None,
    minutes: float,
    quick: bool,
    path: Path | None,
) -> None:
    """Print a table."""
    use_all_cores()
    if part == "speed":
        print_speed(speed(4, trials or (16 if quick else 64)), path)
        return
    names = [name for name in (QUICK if quick and not patterns else LAYERS) if matches(name, patterns)]
    if not names:
        raise click.ClickException(f"no layer matches {' '.join(patterns)}; there are {', '.join(LAYERS)}")
    done: list[Mapping[str, Any]] = []

    def report(row: Mapping[str, Any]) -> None:
        done.append(row)
        click.echo(" | ".join(cells(row)))
        write_json(path, done)

    with ExitStack() as stack:
        folder = work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        click.echo(" | ".join(HEADINGS))
        count, machine = trials or (8 if quick else 64), highest_roofline()
        rows = tune_layers(names, batches or (1, 16), count, folder, 60 * minutes, machine, report)
    print_table(f"tuned layers: {describe_machine()}; {machine}", HEADINGS, [cells(row) for row in rows], notes(rows))


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


def print_speed(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    write_json(path, rows)
    headings = ("", "trials", "failed", "seconds", "trials/min", "rank correlation", "best us")
    print_table(f"one task, {describe_machine()}", headings, [speed_cells(row) for row in rows])
    *others, ours = rows
    for other in others:
        if other["per_minute"]:
            print(f"{ours['per_minute'] / other['per_minute']:.1f} times as many trials a minute as {other['who']}")
    spent = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in ours["spent"].items())
    print(f"milliseconds of a trial of ours, by what the processes do: {spent}")


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    correlation = "-" if row["correlation"] is None else f"{row['correlation']:.2f}"
    best = "-" if row["best"] is None else f"{row['best'] * 1e6:.1f}"
    numbers = [str(row["trials"]), str(row["failed"]), f"{row['seconds']:.0f}", f"{row['per_minute']:.0f}"]
    return [row["who"], *numbers, correlation, best]


if __name__ == "__main__":
    main()
