"""What a session shows: a live table while it runs, and a summary at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tvm_structured.tuning.session import Progress, Watch

if TYPE_CHECKING:
    from tvm_structured.tuning.api import TuningResult

IMPROVED = 1.02  # times as fast as the hand schedule
ROWS = 12  # of the live table
EVERY = 0.2  # seconds between updates


@contextmanager
def watching(total: int, time_budget: float | None) -> Iterator[Watch]:
    """A function for `Session` to report to. Silent where standard error is no terminal."""
    from rich.console import Console
    from rich.live import Live

    if not sys.stderr.isatty():
        yield lambda _, __: None
        return
    start, last, first = time.monotonic(), 0.0, -1
    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:

        def watch(tasks: Sequence[Progress], current: Progress | None) -> None:
            nonlocal last, first
            done = sum(len(task.trials) for task in tasks)
            first = done - 1 if first < 0 else first
            if time.monotonic() - last < EVERY:
                return
            last = time.monotonic()
            spent = last - start
            left = spent / max(1, done - first) * sum(max(0, total - len(t.trials)) for t in tasks if t.best is None)
            if time_budget is not None:
                left = min(left, max(0.0, time_budget - spent))
            live.update(live_table(tasks, current, done, left), refresh=True)

        yield watch


def live_table(tasks: Sequence[Progress], current: Progress | None, done: int, left: float) -> Any:
    finished = sum(task.best is not None for task in tasks)
    title = f"{finished} of {len(tasks)} tasks, {done} trials, at most {minutes(left)} left"
    place = next((index for index, task in enumerate(tasks) if task is current), 0)
    start = max(0, min(place - ROWS // 2, len(tasks) - ROWS))
    return table(tasks[start : start + ROWS], title)


def table(tasks: Sequence[Progress], title: str = "") -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("kernel", overflow="fold")
    for heading in ("uses", "trials", "by hand us", "best us", "faster"):
        made.add_column(heading, justify="right", no_wrap=True)
    for task in tasks:
        times = [microseconds(task.default_seconds), microseconds(task.seconds)]
        ratio = "-" if task.ratio is None else f"{task.ratio:.2f}x"
        made.add_row(task.weighted.task.describe(), str(task.weighted.weight), str(len(task.trials)), *times, ratio)
    return made


def summary(result: TuningResult) -> str:
    """What improved, what did not, what failed, and which layers change their form."""
    from rich.console import Console

    tasks = result.progress
    better = [task for task in tasks if task.ratio is not None and task.ratio >= IMPROVED]
    open_tasks = [task for task in tasks if task.best is None]
    failed = sum(trial.seconds is None for task in tasks for trial in task.trials)
    console = Console(width=110, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table(sorted(tasks, key=lambda task: -(task.ratio or 0.0))))
    lines = [captured.get().rstrip()]
    kept = sum(task.best is not None and task not in better for task in tasks)
    lines.append(
        f"{len(better)} of {len(tasks)} kernels improved, {kept} stay as they were written by hand; "
        f"geometric mean {result.geometric_mean:.2f}x of the hand schedules"
    )
    if open_tasks:
        lines.append(f"{len(open_tasks)} are not finished: the same command goes on with them")
    if failed:
        lines.append(f"{failed} trials failed; see {result.database.file}")
    lines += [f"{layer}: {before} -> {after}, now that it is tuned" for layer, before, after in result.changed]
    lines.append(f"use it: ts.compile(..., database={str(result.database.path)!r})")
    return "\n".join(lines)


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.1f}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def listing(rows: Sequence[Any]) -> str:
    """A table of `maintenance.Row`s."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("kernel", overflow="fold")
    made.add_column("target", overflow="fold")
    for heading in ("trials", "failed", "by hand us", "best us", "faster"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("state")
    for row in rows:
        numbers = [str(row.trials), str(row.failed), microseconds(row.default_seconds), microseconds(row.seconds)]
        state = row.state or ("" if row.is_finished else "not finished")
        made.add_row(row.what, row.target, *numbers, "-" if row.ratio is None else f"{row.ratio:.2f}x", state)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(made)
    return captured.get().rstrip()
