"""Measuring: several callables in one process, in turns, so that noise hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

SLOT = 0.02  # seconds of calls to a turn
PAUSE = 0.01  # seconds; between turns as many of them as it takes until all threads rest
LONGEST_PAUSE = 1.0
WARM = 0.02  # seconds of calls before: a thread pool that sleeps takes milliseconds to spread over the cores


def interleaved_medians(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Seconds for one call of each, the median over rounds of the median within a turn."""
    return {name: statistics.median(turns) for name, turns in interleaved_turns(calls, rounds).items()}


def interleaved_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds for one call of each, the median within a turn, for every round."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(3, min(2000, int(SLOT / max(time.perf_counter() - start, 1e-7))))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            settle()
            end = time.perf_counter() + WARM
            while time.perf_counter() < end:
                call()
            turns[name].append(median_of(call, counts[name]))
    return turns


def settle() -> None:
    """Wait until no thread of this process uses a processor any more.

    Workers of TVM, ONNX Runtime and OpenMP spin for a while after their last task, TVM's for more than 100 ms, and
    take a core away from the library whose turn is next.
    """
    end = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - used < 0.05 * PAUSE:
            return


def median_of(call: Callable[[], Any], count: int) -> float:
    """Median seconds of `count` calls after one that is not counted."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
