"""Measuring for the benchmarks: turns in one process, how far they spread, tables, and what machine it was."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from tvm_structured.metrics import SLOT, interleaved_turns
from tvm_structured.targets import host_cpu, physical_cores

Call = Callable[[], Any]
NOISY = 0.15  # spread of the turns above which a time is marked
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and the interquartile range of the turns as a fraction of the median."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, turns: Sequence[float]) -> Timing:
        median = statistics.median(turns)
        low, high = np.percentile(turns, (25, 75))
        return cls(median, float(high - low) / median)

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


def interleaved(calls: Mapping[str, Call], rounds: int = 9, limit: float = 20.0) -> dict[str, Timing]:
    """Time calls in turns, so that noise hits all alike; fewer rounds, at least three, where they exceed `limit`."""
    round_seconds = 0.0
    for call in calls.values():
        call()
        start = time.perf_counter()
        call()
        round_seconds += 5 * (time.perf_counter() - start) + SLOT
    turns = interleaved_turns(calls, max(MIN_ROUNDS, min(rounds, int(limit / round_seconds))))
    return {name: Timing.of(values) for name, values in turns.items()}


def relative_error(actual: Any, expected: Any) -> float:
    """Largest deviation relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def machine() -> dict[str, Any]:
    """What a reader needs to know about the machine and the versions."""
    import onnxruntime
    import torch
    import tvm

    return {
        "cpu": host_cpu(),
        "threads": physical_cores(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "tvm": tvm.__version__,
        "load": load_average(),
    }


def load_average() -> float | None:
    """Mean number of processes that wanted to run in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe_machine() -> str:
    about = machine()
    versions = f"torch {about['torch']}, ONNX Runtime {about['onnxruntime']}, TVM {about['tvm']}"
    return f"{about['cpu']}, {about['threads']} threads, float32, {versions}, load average {about['load']}"


def milliseconds(timing: Timing | None) -> str:
    """`12.34`, `12.34~` where the turns spread too far, `-` where there is no time."""
    return marked(timing, 1e3, 2)


def microseconds(timing: Timing | None) -> str:
    return marked(timing, 1e6, 0)


def marked(timing: Timing | None, scale: float, digits: int) -> str:
    if timing is None:
        return "-"
    return f"{timing.seconds * scale:,.{digits}f}{'~' if timing.noisy else ''}"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table whose first column is text and whose others are numbers, and notes below it."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(120, 30 + 14 * len(headings)))
    console.print(table)
    if any("~" in cell for row in rows for cell in row):
        notes = [*notes, f"~ noisy: the middle half of the turns spreads over more than {NOISY:.0%} of the median"]
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows and machine, where a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
