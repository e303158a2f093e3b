"""Measuring: several callables in one process, in turns, so that noise hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

SLOT = 0.02  # seconds of calls to a turn
PAUSE = 0.05  # seconds between turns: the threads of a library spin for a while, and would take cores from the next


def interleaved_medians(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Seconds for one call of each, the median over rounds of the median within a turn."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(3, min(2000, int(SLOT / max(time.perf_counter() - start, 1e-7))))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            turns[name].append(median_of(call, counts[name]))
    return {name: statistics.median(values) for name, values in turns.items()}


def median_of(call: Callable[[], Any], count: int) -> float:
    """Median seconds of `count` calls after one that is not counted."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
