"""A process that builds and times candidates. It stays warm: TVM is imported once, several candidates are built
before they are timed, in memory, without files or a linker.

    python -m tvm_structured.tuning.worker READ_FD WRITE_FD

One JSON object a line: it is told a task, then to build, time or compare candidates. It ends with its input, or when
its parent is gone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 64  # numbers of the output that are compared with the hand schedule's
KEPT_BYTES = 80 << 20  # arguments larger than that are made again when they are needed


class Bench:
    """The candidates of one task, and the device that they run on."""

    def __init__(self, task: Any, remote: Mapping[str, Any] | None = None) -> None:
        self.task, self.remote = task, remote
        self.built: dict[str, tuple[Any, Any]] = {}
        self.arguments: dict[str, list[np.ndarray]] = {}

    # -- what it is told to do -------------------------------------------------------------------

    def build(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Compile; the candidate waits under its name."""
        import tvm

        from tvm_structured.gpu_build import device_code

        start = time.perf_counter()
        func, arguments = self.task.build(config)
        emitted = time.perf_counter()
        target = self.task.tvm_target
        with target, device_code(target, cuda_graph=False):
            library = tvm.compile(func.with_attr("global_symbol", "main"), target)
        if not self.remote:
            library["main"]  # machine code is made when it is asked for: now, while other processes build, too
        self.built[name] = library, config
        if sum(array.nbytes for array in arguments) <= KEPT_BYTES:
            self.arguments[name] = arguments
        return {"emit": emitted - start, "compile": time.perf_counter() - emitted}

    def time(self, name: str, limit: float | None) -> dict[str, Any]:
        """Seconds of one call, and a sample of its output."""
        from tvm_structured.tuning.clock import adaptive_seconds

        start = time.perf_counter()
        with self.loaded(name) as (turns, output):
            ready = time.perf_counter()
            seconds = adaptive_seconds(turns, float("inf") if limit is None else limit, self.task.is_cold)
            sample = sample_of(output.numpy(), self.task)
        self.drop(name)
        return {"seconds": seconds, "sample": sample, "load": ready - start, "run": time.perf_counter() - ready}

    def compare(self, configs: list[Mapping[str, Any]], rounds: int) -> dict[str, Any]:
        """Seconds of each candidate by round, taken in turns."""
        from contextlib import ExitStack

        from tvm_structured.tuning.clock import seconds_by_turn

        names = [f"compared {number}" for number in range(len(configs))]
        for name, config in zip(names, configs, strict=True):
            self.build(name, config)
        session = self.session() if self.remote else None  # one for all: they are to meet on the same machine
        with ExitStack() as stack:
            contestants = [stack.enter_context(self.loaded(name, session))[0] for name in names]
            taken = seconds_by_turn(contestants, rounds, self.task.is_cold)
        for name in names:
            self.drop(name)
        return {"turns": taken}

    def drop(self, name: str) -> None:
        self.built.pop(name, None)
        self.arguments.pop(name, None)

    # -- devices ---------------------------------------------------------------------------------

    def loaded(self, name: str, session: Any = None) -> Any:
        """The candidate on its device: (turns, output), for a with statement. A remote one takes a session of its own
        where none is given."""
        library, config = self.built[name]
        arguments = self.arguments.get(name) or self.task.build(config)[1]
        if self.remote:
            return self.loaded_remotely(session or self.session(), library, arguments)
        return self.loaded_here(library, arguments)

    def loaded_here(self, library: Any, arguments: list[np.ndarray]) -> Any:
        from contextlib import nullcontext

        import tvm

        from tvm_structured.tuning.clock import evaluator

        device = tvm.device(self.task.tvm_target.kind.name if "cpu" not in self.task.tvm_target.keys else "cpu")
        tensors = [tvm.runtime.tensor(array, device) for array in arguments]
        if self.task.is_cold and "cpu" in self.task.tvm_target.keys:
            return nullcontext((cold_turns(library["main"], tensors), tensors[-1]))
        return nullcontext((evaluator(library.mod, device, tensors, False), tensors[-1]))

    def loaded_remotely(self, session: Any, library: Any, arguments: list[np.ndarray]) -> Any:
        from contextlib import contextmanager

        import tvm

        from tvm_structured.tuning.clock import evaluator

        @contextmanager
        def upload() -> Any:
            device = session.device("cpu" if "cpu" in self.task.tvm_target.keys else self.task.tvm_target.kind.name)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"candidate{os.getpid()}_{time.monotonic_ns()}.tar"
                library.export_library(str(path))
                session.upload(str(path))
                module = session.load_module(path.name)
                tensors = [tvm.runtime.tensor(array, device) for array in arguments]
                try:
                    yield evaluator(module, device, tensors, self.task.is_cold), tensors[-1]
                finally:
                    session.remove(path.name)
                    session.remove(f"{path.name}.so")

        return upload()

    def session(self) -> Any:
        """A connection to a server that the tracker chooses, for one candidate: others wait for servers, too. It ends
        when nothing refers to it any more."""
        from tvm import rpc

        assert self.remote is not None
        tracker = rpc.connect_tracker(self.remote["host"], self.remote["port"])
        try:
            return tracker.request(self.remote["key"], session_timeout=int(4 * self.remote["timeout"]), max_retry=1)
        finally:
            tracker.close()


def cold_turns(main: Any, tensors: list[Any]) -> Any:
    """Each call finds its weights in memory and x in the cache, as in a model."""
    from tvm_structured.timing import evictor, seconds_of

    evict = evictor()

    def turns(number: int, repeat: int) -> list[float]:
        taken = []
        main(*tensors)
        for _ in range(repeat):
            evict()
            tensors[0].numpy()
            taken.append(seconds_of(main, tensors))
        return taken

    return turns


def sample_of(output: np.ndarray, task: Any) -> list[float]:
    """Some numbers of the output, evenly spread; lanes that belong to no channel are passed over."""
    if getattr(task, "blocked", (False, False))[1]:
        output = output[:, 0, ..., : min(output.shape[-1], task.y_shape[1])]
    flat = output.reshape(-1).astype(np.float32, copy=False)
    places = np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64)
    return [float(value) for value in flat[places]]


# -- the process ------------------------------------------------------------------------------------------


def serve(reader: Any, writer: Any) -> None:
    """Answer requests until the input ends."""
    bench: Bench | None = None
    for line in reader:
        request = json.loads(line)
        try:
            if request["do"] == "task":
                bench = Bench(read_task(request["task"]), request.get("remote"))
                answer: dict[str, Any] = {}
            else:
                assert bench is not None, "no task yet"
                do = {"build": bench.build, "time": bench.time, "compare": bench.compare}[request["do"]]
                answer = do(**request["with"])
        except Exception as error:  # whatever TVM, LLVM or a lost server raises is the candidate's fault, not ours
            answer = {"error": f"{type(error).__name__}: {last_line(error)}"}
        if bench is not None and bench.remote:
            gc.collect()  # what is left of a failed candidate would keep its server
        writer.write(json.dumps(answer) + "\n")
        writer.flush()


def read_task(described: Mapping[str, Any]) -> Any:
    from tvm_structured.tuning.schedule_tasks import ScheduleTask
    from tvm_structured.tuning.tasks import KernelTask

    if described.get("module", "__main__") != "__main__":
        importlib.import_module(described["module"])  # a kernel from outside the package enters the table so
    return {"kernel": KernelTask, "schedule": ScheduleTask}[described["kind"]].from_json(described)


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def end_with_parent(parent: int) -> None:
    """Ends this process, even one that hangs in a kernel, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    importlib.import_module("tvm_structured.tuning.schedule_tasks")  # before it is told a task, which may take a while
    importlib.import_module("tvm.s_tir")
    with os.fdopen(int(sys.argv[1]), "r") as reader, os.fdopen(int(sys.argv[2]), "w") as writer:
        serve(reader, writer)


if __name__ == "__main__":
    main()
