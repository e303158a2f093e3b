"""Times of one compiled layer, as it will run in its model: with weights that are in cache, or that are not."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 5
COLD_RUNS = 3  # to a round
HOT_SECONDS = 3e-3  # of runs to a round
LEAST_RUNS = 12  # to a round: one that waited for a busy processor must not end it
MOST_SECONDS = 30e-3  # of runs to a round that are few
QUANTILE = 0.1  # of the times that counts
CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache"
USUAL_CACHE = 32 * 1024 * 1024  # bytes, where the system does not tell


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache, from Linux's topology."""
    sizes = []
    for entry in sorted(Path(CACHE_SIZES).glob("index*/size")):
        number = entry.read_text(encoding="ascii").strip()
        if number.endswith("K") and number[:-1].isdigit():
            sizes.append(int(number[:-1]) * 1024)
    return max(sizes, default=USUAL_CACHE)


def seconds_in_turns(machines: Sequence[Any], inputs: Sequence[Sequence[np.ndarray]], is_cold: bool) -> list[float]:
    """Seconds of one run of each machine's `main`, taken in turns, so that a slow phase of the processor hits all.

    Cold: all but the inputs has left the caches before each run. What else the processor does only makes runs slower,
    so a low quantile counts.
    """
    import tvm

    runs = []
    for machine, arrays in zip(machines, inputs, strict=True):
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        main = machine["main"]
        main(*tensors)
        runs.append((main, tensors))
    take = cold_runs if is_cold else hot_runs
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for taken, (main, tensors) in zip(times, runs, strict=True):
            taken += take(main, tensors)
    return [float(np.quantile(taken, QUANTILE)) for taken in times]


def hot_runs(main: Any, tensors: Sequence[Any]) -> list[float]:
    """A run that is not counted, then as many as fit HOT_SECONDS, or LEAST_RUNS if they fit MOST_SECONDS."""
    main(*tensors)
    times: list[float] = []
    spent = 0.0
    while spent < HOT_SECONDS or (len(times) < LEAST_RUNS and spent < MOST_SECONDS):
        times.append(seconds_of(main, tensors))
        spent += times[-1]
    return times


def cold_runs(main: Any, tensors: Sequence[Any]) -> list[float]:
    times, evict = [], evictor()
    for _ in range(COLD_RUNS):
        evict()
        for tensor in tensors:
            tensor.numpy()  # reads them, as the layer before has written them
        times.append(seconds_of(main, tensors))
    return times


def seconds_of(main: Any, tensors: Sequence[Any]) -> float:
    start = time.perf_counter()
    main(*tensors)
    return time.perf_counter() - start


@functools.cache
def evictor() -> Callable[[], None]:
    """Reads twice the last-level cache with all threads, which also leaves them awake, as in a model."""
    import tvm

    from tvm_structured.schedules.cpu import Cpu
    from tvm_structured.schedules.emit import Emitter, arg, parallel, prim_func, serial
    from tvm_structured.targets import physical_cores

    cores = physical_cores()
    e = Emitter(Cpu(lanes=16, cores=cores))
    size = -(-2 * last_level_cache() // 4 // cores // 256) * 256
    with prim_func("evict") as made:
        source, sums = arg("source", (cores, size)), arg("sums", (cores, 16))
        with parallel(0, cores) as core:
            total = e.registers(1)
            e.zero(total)
            with serial(0, size // 16) as i:
                e.set(total[0], total[0][0] + e.load(source, core, i * 16))
            e.store(sums, total[0][0], core, 0)
    library = tvm.compile(made.func.with_attr("global_symbol", "main"), tvm.target.Target("llvm"))
    buffers = [tvm.runtime.tensor(np.ones(shape, np.float32)) for shape in ((cores, size), (cores, 16))]
    run = library["main"]
    return lambda: run(*buffers)
