"""Wall times of a Python function in the form of TVM's own."""

from __future__ import annotations

import time
from collections.abc import Callable

from tvm.runtime.module import BenchmarkResult


def measure(once: Callable[[], None], number: int, repeat: int, min_seconds: float) -> BenchmarkResult:
    """`repeat` means, in seconds, of `number` calls or of as many as last `min_seconds`, after one call to warm up."""
    once()
    results = []
    for _ in range(repeat):
        calls, elapsed = 0, 0.0
        while calls < number or elapsed < min_seconds:
            start = time.perf_counter()
            once()
            elapsed += time.perf_counter() - start
            calls += 1
        results.append(elapsed / calls)
    return BenchmarkResult(results)
