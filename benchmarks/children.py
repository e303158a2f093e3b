"""Work in a process of its own: with a time limit, or to see what memory and time it takes from a fresh start."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class ChildFailed(Exception):
    """The other process failed or took too long."""


def in_child(work: Callable[..., Any], *args: Any, limit: float) -> Any:
    """work(*args) in a fresh process; raises ChildFailed after `limit` seconds, or with the error it met."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise ChildFailed(f"more than {limit:.0f} s")
        done, result = ours.recv()
    except EOFError:
        process.join()
        raise ChildFailed(f"process ended with {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    if not done:
        raise ChildFailed(result)
    return result


def answer(connection: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((True, work(*args)))
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))


def plain_tvm_run(model: str, batch: int, seconds: float) -> tuple[Any, list[float]]:
    """Output and times of plain TVM: a first run that is not counted, then at most five within `seconds`."""
    import torch
    from model_peers import plain_tvm
    from networks import network

    torch.set_num_threads(1)
    call = plain_tvm(*network(model, batch))
    output, times, end = call(), [], time.perf_counter() + seconds
    while len(times) < 2 or (len(times) < 5 and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return output, times


def compile_twice(model: str, batch: int) -> dict[str, float]:
    """Seconds of ts.compile with an empty and with a filled cost store, and megabytes at its peak beyond the model."""
    from networks import network

    import tvm_structured as ts

    module, x = network(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TVM_STRUCTURED_CACHE"] = folder
        before = peak_bytes()
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            ts.compile(module, (x,), target="host")
            seconds.append(time.perf_counter() - start)
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    mega = 1e-6
    return {
        "cold_seconds": seconds[0],
        "warm_seconds": seconds[1],
        "weights_mb": weights * mega,
        "before_mb": before * mega,
        "peak_mb": peak_bytes() * mega,
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    try:
        # getrusage counts what the parent had before exec, too
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
