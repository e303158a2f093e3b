"""Measurers: who builds and times candidates. Here, on this machine with processes that stay warm."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tvm_structured.schedules import Config
from tvm_structured.tuning.tasks import config_text

TIMEOUT = 30.0  # seconds for building or for timing one candidate
START = 120.0  # seconds for a process to import TVM, on a machine that has other things to do
SAME = 1e-3  # of the largest number: how far outputs of two configurations may differ


class WorkerLost(Exception):
    """A worker crashed, or hung and was killed."""


@dataclass(frozen=True)
class Measured:
    """The time of one candidate, or why there is none. `lost`: its worker or server went away, which says nothing
    about the candidate."""

    seconds: float | None
    error: str = ""
    lost: bool = False
    sample: Sequence[float] = ()


class Measurer(Protocol):
    """What a session needs of its workers."""

    def measure(self, task: Any, configs: Sequence[Config], limit: float) -> Iterator[tuple[int, Measured]]:
        """(index, time) of every configuration, as they come. `limit`: the best time so far, or infinity. Outputs are
        compared with that of the hand schedule, which is run first where it is not among them."""

    def compare(self, task: Any, configs: Sequence[Config], rounds: int) -> list[list[float]] | None:
        """Seconds of each configuration by round, taken in turns; None where that failed."""

    def close(self) -> None:
        """End the workers."""


class Worker:
    """A process of `worker.py`; it is started when it is needed, and again after it was lost."""

    def __init__(self, threads: int, remote: Mapping[str, Any] | None = None) -> None:
        self.threads, self.remote = threads, remote
        self.generation = 0  # changes whenever a process starts or ends: what an earlier one built is gone
        self._process: subprocess.Popen[bytes] | None = None
        self._task: Any = None

    def ask(self, task: Any, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The answer to one request about a task. Raises WorkerLost; the next request starts a new process."""
        self.start()
        if self._task is not task:
            self._send({"do": "task", "task": task.to_json(), "remote": self.remote})
            answer = self._receive(START)
            if "error" in answer:
                return answer
            self._task = task
        self._send({"do": do, "with": arguments})
        return self._receive(timeout)

    def start(self) -> None:
        """Start the process if there is none; it imports TVM while this one goes on."""
        if self._process is not None:
            return
        inner_read, self._write = os.pipe()
        self._read, inner_write = os.pipe()
        environment = {**os.environ, "TVM_NUM_THREADS": str(self.threads), "PYTHONPATH": search_path()}
        environment.pop("OMP_NUM_THREADS", None)  # it would win over the number of threads
        command = [sys.executable, "-m", "tvm_structured.tuning.worker", str(inner_read), str(inner_write)]
        self._process = subprocess.Popen(
            command, pass_fds=(inner_read, inner_write), env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(inner_read)
        os.close(inner_write)
        self._pending = b""
        self.generation += 1

    def _send(self, request: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except OSError:
            raise self._lost("the worker process ended") from None

    def _receive(self, timeout: float) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise self._lost(f"no answer within {timeout:.0f} s, killed")
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise self._lost("the worker process crashed")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self, why: str) -> WorkerLost:
        code = None if self._process is None else self._process.poll()
        self.close()
        return WorkerLost(why if code is None else f"{why} (exit code {code})")

    def kill(self) -> None:
        """End the process; whoever waits for its answer gets WorkerLost."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._process, self._task = None, None
        self.generation += 1


def search_path() -> str:
    """Where this process finds its packages: the worker has to find the same ones."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


class Samples:
    """Outputs of the candidates of a task against that of the hand schedule, which comes first: a candidate that
    computes something else has failed, however fast it is."""

    def __init__(self) -> None:
        self._expected: dict[str, np.ndarray] = {}

    def know(self, task: Any) -> bool:
        return task.key in self._expected

    def need_hand_schedule(self, task: Any, configs: Sequence[Config]) -> bool:
        """Whether it has to be run before these: a session that goes on begins with other candidates."""
        return bool(configs) and not self.know(task) and config_text(configs[0]) != config_text(task.by_hand)

    def differs(self, task: Any, sample: Sequence[float]) -> bool:
        values = np.asarray(sample, np.float64)
        expected = self._expected.setdefault(task.key, values)
        if not np.isfinite(expected).all():
            return False  # numbers too large for float32 tell nothing
        return not bool(np.abs(values - expected).max(initial=0.0) <= SAME * np.abs(expected).max(initial=1e-30))


class LocalMeasurer:
    """All processes build their share of a batch at the same time; then the candidates are timed one after the other,
    while the machine does nothing else."""

    def __init__(self, cores: int, timeout: float = TIMEOUT) -> None:
        self.workers = [Worker(cores) for _ in range(max(1, min(cores, 8)))]
        self.timeout = timeout
        self.spent: Counter[str] = Counter()  # seconds of all processes, by what they did
        self._samples = Samples()
        self._pool = ThreadPoolExecutor(len(self.workers))
        self._batch = 0

    def measure(self, task: Any, configs: Sequence[Config], limit: float) -> Iterator[tuple[int, Measured]]:
        self._batch += 1
        for worker in self.workers:  # also those that have nothing to do yet: starting takes seconds
            worker.start()
        if self._samples.need_hand_schedule(task, configs):
            worker, name = self.workers[0], f"{self._batch}.by hand"
            built_by_hand = self._build(worker, task, name, task.by_hand)
            self._time(worker, task, name, task.by_hand, built_by_hand, math.inf)
        names = [f"{self._batch}.{number}" for number in range(len(configs))]
        shares = [range(start, len(configs), len(self.workers)) for start in range(len(self.workers))]
        built = list(
            self._pool.map(
                lambda worker, share: {i: self._build(worker, task, names[i], configs[i]) for i in share},
                self.workers, shares,
            )
        )  # fmt: skip
        for index in range(len(configs)):  # in order, so that the first output is the hand schedule's
            worker, results = self.workers[index % len(self.workers)], built[index % len(self.workers)]
            measured = self._time(worker, task, names[index], configs[index], results[index], limit)
            if measured.seconds is not None:
                limit = min(limit, measured.seconds)
            yield index, measured

    def _build(self, worker: Worker, task: Any, name: str, config: Config) -> tuple[int, str]:
        """(generation of the process that has it, error)."""
        try:
            answer = worker.ask(task, "build", self.timeout, name=name, config=config)
        except WorkerLost as error:
            return 0, f"while building: {error}"
        self._account(answer, ("emit", "compile"))
        return worker.generation, answer.get("error", "")

    def _time(
        self, worker: Worker, task: Any, name: str, config: Config, built: tuple[int, str], limit: float
    ) -> Measured:
        if not built[1] and built[0] != worker.generation:  # it was lost with a process that crashed later
            built = self._build(worker, task, name, config)
        if built[1]:
            return Measured(None, built[1])
        try:
            answer = worker.ask(task, "time", self.timeout, name=name, limit=limit if limit < math.inf else None)
        except WorkerLost as error:
            return Measured(None, f"while running: {error}")
        if "error" in answer:
            return Measured(None, answer["error"])
        self._account(answer, ("load", "run"))
        if self._samples.differs(task, answer["sample"]):
            return Measured(None, "its output differs from that of the hand schedule")
        return Measured(answer["seconds"])

    def _account(self, answer: Mapping[str, Any], names: Sequence[str]) -> None:
        self.spent.update({name: answer.get(name, 0.0) for name in names})

    def compare(self, task: Any, configs: Sequence[Config], rounds: int) -> list[list[float]] | None:
        try:
            answer = self.workers[0].ask(task, "compare", 4 * self.timeout, configs=list(configs), rounds=rounds)
        except WorkerLost:
            return None
        return answer.get("turns")

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self._pool.shutdown()
        for worker in self.workers:
            worker.close()
