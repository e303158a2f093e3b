"""Times of one compiled layer, as it will run in its model: with weights that are in cache, or that are not."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLD_RUNS = 9
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


def median_seconds(machine: Any, inputs: Sequence[np.ndarray], is_cold: bool) -> float:
    """Median seconds of one run of `main`. Cold: all but the inputs has left the caches before each run."""
    import tvm

    arrays = [tvm.runtime.tensor(array) for array in inputs]
    if not is_cold:
        evaluator = machine.time_evaluator("main", tvm.cpu(), number=1, repeat=5, min_repeat_ms=4)
        return float(evaluator(*arrays).median)
    main, evict = machine["main"], evictor()
    main(*arrays)
    times = []
    for _ in range(COLD_RUNS):
        evict()
        for array in arrays:
            array.numpy()  # reads them, as the layer before has written them
        start = time.perf_counter()
        main(*arrays)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
