"""Measuring on other machines, through the tracker and the servers of TVM's RPC.

Every server of the key has a process here that builds for it. A server that goes away, or hangs, costs the time to
notice; its candidate is measured again by another one.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tvm_structured.errors import TuningError
from tvm_structured.schedules import Config
from tvm_structured.tuning.workers import TIMEOUT, Measured, Samples, Worker, WorkerLost

ATTEMPTS = 3  # for a candidate whose server is lost
CONNECT = 5.0  # seconds for the tracker to answer
WAIT = 30.0  # seconds for a first server to register
MOST_WORKERS = 32


class RpcMeasurer:
    """Measures on every server that is registered under `key` at `tracker`, "host:port", when the session starts."""

    def __init__(self, tracker: str, key: str | None, timeout: float = TIMEOUT, wait: float = WAIT) -> None:
        host, port = check_address(tracker, key)
        self.tracker, self.key, self.timeout = tracker, key, timeout
        self._address = host, port
        count = self._wait_for_servers(wait)
        remote = {"host": host, "port": port, "key": key, "timeout": timeout}
        self.workers = [Worker(1, remote) for _ in range(min(count, MOST_WORKERS))]
        self._samples = Samples()
        self._batch = 0

    def measure(self, task: Any, configs: Sequence[Config], limit: float) -> Iterator[tuple[int, Measured]]:
        """As they are done; in a first batch those that come before the hand schedule wait for it."""
        self._batch += 1
        if self._samples.need_hand_schedule(task, configs):
            self._checked(task, self._measure_one(self.workers[0], task, task.by_hand, f"{self._batch}.by hand", limit))
        waiting: queue.Queue[tuple[int, int]] = queue.Queue()
        done: queue.Queue[tuple[int, Measured]] = queue.Queue()
        for index in range(len(configs)):
            waiting.put((index, 1))
        stop = threading.Event()

        def work(worker: Worker) -> None:
            while not stop.is_set():
                try:
                    index, attempt = waiting.get(timeout=0.1)
                except queue.Empty:
                    continue
                measured = self._measure_one(worker, task, configs[index], f"{self._batch}.{index}.{attempt}", limit)
                if measured.lost and attempt < ATTEMPTS and not stop.is_set():
                    waiting.put((index, attempt + 1))
                else:
                    done.put((index, measured))

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        try:
            early: list[tuple[int, Measured]] = []
            is_first_done = self._samples.know(task)
            for _ in configs:
                early.append(done.get())
                is_first_done |= early[-1][0] == 0
                if not is_first_done:
                    continue
                for index, measured in sorted(early, key=lambda result: result[0]):
                    if measured.lost:
                        self._check_servers()
                    yield index, self._checked(task, measured)
                early.clear()
        except BaseException:  # also a stop from the keyboard, or a caller that wants no more
            stop.set()
            for worker in self.workers:
                worker.kill()
            raise
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _measure_one(self, worker: Worker, task: Any, config: Config, name: str, limit: float) -> Measured:
        try:
            answer = worker.ask(task, "build", self.timeout, name=name, config=config)
            if "error" in answer:
                return Measured(None, answer["error"])
            known = limit if limit < float("inf") else None
            answer = worker.ask(task, "time", 2 * self.timeout, name=name, limit=known)
        except WorkerLost as error:
            return Measured(None, str(error), lost=True)
        if "error" in answer:
            return Measured(None, answer["error"], lost=True)
        return Measured(answer["seconds"], sample=answer["sample"])

    def _checked(self, task: Any, measured: Measured) -> Measured:
        if measured.seconds is not None and self._samples.differs(task, measured.sample):
            return Measured(None, "its output differs from that of the hand schedule")
        return measured

    def compare(self, task: Any, configs: Sequence[Config], rounds: int) -> list[list[float]] | None:
        """On one server, the next one if that is lost."""
        for worker in (self.workers * ATTEMPTS)[:ATTEMPTS]:
            try:
                answer = worker.ask(task, "compare", 4 * self.timeout, configs=list(configs), rounds=rounds)
            except WorkerLost:
                continue
            if "turns" in answer:
                turns: list[list[float]] = answer["turns"]
                return turns
        return None

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    # -- the tracker -----------------------------------------------------------------------------

    def _wait_for_servers(self, wait: float) -> int:
        """How many there are. Raises TuningError where the tracker, or a server of the key, does not show up."""
        end = time.monotonic() + wait
        while True:
            count = self._count_servers()
            if count:
                return count
            if time.monotonic() > end:
                raise TuningError(
                    f"no server with key {self.key!r} is registered at {self.tracker}; start one: "
                    f"python -m tvm.exec.rpc_server --tracker {self.tracker} --key {self.key}"
                )
            time.sleep(0.5)

    def _check_servers(self) -> None:
        """Raises TuningError where no server is left; what was measured is kept."""
        if not self._count_servers():
            raise TuningError(
                f"no server with key {self.key!r} is left at {self.tracker}; start one and run the same command again"
            )

    def _count_servers(self) -> int:
        """Servers of the key that the tracker knows, busy ones included."""
        from tvm import rpc

        try:
            socket.create_connection(self._address, CONNECT).close()  # TVM itself would try for a minute
            tracker = rpc.connect_tracker(*self._address)
        except (OSError, RuntimeError) as error:
            raise TuningError(f"no RPC tracker answers at {self.tracker} ({error})") from None
        try:
            summary = tracker.summary()
        finally:
            tracker.close()
        return sum(str(server.get("key", "")) == f"server:{self.key}" for server in summary["server_info"])


def check_address(tracker: str, key: str | None) -> tuple[str, int]:
    """(host, port). Raises TuningError for an address that is none, and for a missing key."""
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdigit():
        raise TuningError(f"rpc_tracker {tracker!r}: write HOST:PORT, such as 127.0.0.1:9190")
    if not key:
        raise TuningError(f"rpc_tracker {tracker!r} without rpc_key: give the key of the servers to use")
    return host, int(port)
