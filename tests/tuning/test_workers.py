"""Workers that crash, hang or build nonsense cost a trial each, and nothing else."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tuning_samples import sample_task

from tvm_structured.tuning.clock import adaptive_seconds, seconds_by_turn, slot
from tvm_structured.tuning.rpc import RpcMeasurer
from tvm_structured.tuning.tasks import config_text
from tvm_structured.tuning.workers import LocalMeasurer, Samples, Worker, WorkerLost

TASK = sample_task()


@pytest.fixture(scope="module")
def measurer() -> Iterator[LocalMeasurer]:
    made = LocalMeasurer(2)
    yield made
    made.close()


def test_candidates_are_measured_in_order_and_a_bad_one_fails_alone(measurer: LocalMeasurer) -> None:
    configs = [TASK.space[0], {"way": "unheard of"}, TASK.space[1]]
    results = list(measurer.measure(TASK, configs, math.inf))
    assert [index for index, _ in results] == [0, 1, 2]
    first, bad, last = (measured for _, measured in results)
    assert first.seconds and last.seconds and 1e-8 < first.seconds < 1
    assert bad.seconds is None and "unheard of" in bad.error
    turns = measurer.compare(TASK, [TASK.space[0], TASK.space[1]], 3)
    assert turns is not None and [len(taken) for taken in turns] == [3, 3] and min(map(min, turns)) > 0


def test_a_worker_that_crashes_or_hangs_is_replaced(measurer: LocalMeasurer) -> None:
    for how in (signal.SIGKILL, signal.SIGSTOP):
        (worker, *_) = measurer.workers
        list(measurer.measure(TASK, [TASK.space[0]], math.inf))
        assert worker._process is not None
        pid = worker._process.pid
        os.kill(pid, how)
        with pytest.raises(WorkerLost):
            worker.ask(TASK, "build", 1.0, name="x", config=TASK.space[0])
        ((_, measured),) = measurer.measure(TASK, [TASK.space[0]], math.inf)
        assert measured.seconds and worker._process.pid != pid


def test_what_was_built_in_a_process_that_is_gone_is_built_again(measurer: LocalMeasurer) -> None:
    results = measurer.measure(TASK, [TASK.space[0]] * 4, math.inf)
    assert next(results)[1].seconds
    for worker in measurer.workers:
        worker.kill()
    rest = [measured for _, measured in results]
    # the next candidate of each process is the one that finds it gone
    assert sum(measured.seconds is None for measured in rest) <= 2 and rest[-1].seconds


def test_another_result_than_that_of_the_hand_schedule_is_a_failure() -> None:
    samples = Samples()
    assert not samples.differs(TASK, [1.0, -2.0])
    assert not samples.differs(TASK, [1.0005, -2.0])
    assert samples.differs(TASK, [1.0, 2.0])
    assert samples.differs(TASK, [math.nan, -2.0])


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tuning_samples import sample_task\nfrom tvm_structured.tuning.workers import Worker\n"
        "task, worker = sample_task(), Worker(1)\n"
        "worker.ask(task, 'build', 100, name='x', config=task.space[0])\n"
        "print(worker._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(tests)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        subprocess.run(["sleep", "0.1"], check=True)
    pytest.fail(f"worker {pid} is still there")


def test_a_session_that_goes_on_compares_outputs_with_the_hand_schedule() -> None:
    """Not with whatever it happens to try first."""
    fresh = LocalMeasurer(1)
    try:
        results = [measured for _, measured in fresh.measure(TASK, [TASK.space[1], TASK.space[2]], math.inf)]
        assert all(measured.seconds for measured in results) and fresh._samples.know(TASK)
        asked: list[Any] = []
        fresh._build = lambda *words: asked.append(words[-1]) or (0, "not built")  # type: ignore[method-assign]
        list(fresh.measure(TASK, [TASK.space[3]], math.inf))
        assert asked == [TASK.space[3]], "the hand schedule is run once"
        assert not list(fresh.measure(TASK, [], math.inf))
    finally:
        fresh.close()


class Answers:
    """Stands for a process with a server: says when it is done, and with what."""

    def __init__(self, outputs: dict[str, float], first: str) -> None:
        self.outputs, self.first, self.asked = outputs, first, list[str]()
        self.is_first_done = threading.Event()
        self.config = ""

    def ask(self, task: Any, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        if do == "build":
            self.config = config_text(arguments["config"])
            self.asked.append(self.config)
            return {}
        if self.config == self.first:
            self.is_first_done.set()
        else:
            assert self.is_first_done.wait(10)
        return {"seconds": 1e-5, "sample": [self.outputs[self.config]]}

    def kill(self) -> None:
        pass


def remote_measurer(*workers: Answers) -> RpcMeasurer:
    made = RpcMeasurer.__new__(RpcMeasurer)
    made.workers, made.timeout, made._samples, made._batch = list(workers), 1.0, Samples(), 0  # type: ignore[arg-type]
    return made


def test_remote_results_are_handed_on_as_they_come_and_compared_with_the_hand_schedule() -> None:
    texts = [config_text(config) for config in TASK.space[:4]]
    outputs = dict(zip(texts, (1.0, 7.0, 1.0, 1.0), strict=True))
    late, early = Answers(outputs, texts[1]), Answers(outputs, texts[1])
    early.is_first_done = late.is_first_done
    results = list(remote_measurer(late, early).measure(TASK, TASK.space[:4], math.inf))
    assert results[0][0] == 0 and sorted(index for index, _ in results) == [0, 1, 2, 3]
    failed = {index for index, measured in results if measured.seconds is None}
    assert failed == {1}, "the wrong one was the first to be done, and yet it is the one that differs"

    again = Answers(outputs, texts[0])
    ((_, measured),) = remote_measurer(again).measure(TASK, [TASK.space[1]], math.inf)
    assert again.asked == texts[:2] and "differs" in measured.error


# -- the clock ------------------------------------------------------------------------------------------


class Steady:
    """Every call takes the same time; counts the calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, number: int, repeat: int) -> list[float]:
        self.calls += number * repeat
        return [self.seconds] * repeat


def test_candidates_far_behind_are_dropped_and_close_ones_looked_at_for_longer() -> None:
    far, close, first = Steady(3e-5), Steady(1.05e-5), Steady(1e-5)
    assert adaptive_seconds(far, 1e-5) == 3e-5
    assert adaptive_seconds(close, 1e-5) == 1.05e-5
    assert adaptive_seconds(first, math.inf) == 1e-5
    assert far.calls < first.calls < close.calls


def test_a_slow_call_fills_a_turn_alone() -> None:
    assert slot(1.0) == 1 and slot(1e-6) > 100
    assert seconds_by_turn([Steady(1.0), Steady(2.0)], 3) == [[1.0] * 3, [2.0] * 3]


def test_a_worker_says_why_a_description_is_no_task() -> None:
    class Broken:
        def to_json(self) -> dict[str, str]:
            return {"kind": "kernel"}

    worker = Worker(1)
    try:
        assert "not the description" in worker.ask(Broken(), "build", 60.0, name="x", config={})["error"]
    finally:
        worker.close()
