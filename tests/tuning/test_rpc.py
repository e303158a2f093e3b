"""Measuring through a tracker and two servers on loopback, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tvm_structured as ts
from tvm_structured.errors import TuningError
from tvm_structured.tuning.rpc import RpcMeasurer
from tvm_structured.tuning.workers import TIMEOUT

pytestmark = pytest.mark.tune

KEY = "tests"
STARTS_WITHIN = 180.0  # seconds, on a machine that has other things to do


def start(module: str, *words: object) -> subprocess.Popen[bytes]:
    """A process, with its children in a group of its own."""
    environment = {**os.environ, "TVM_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, *map(str, words)]
    output = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def farm() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """(address of the tracker, two servers)."""
    port, host = free_port(), ("--host", "127.0.0.1")
    processes = [start("tvm.exec.rpc_tracker", *host, "--port", port, "--port-end", port + 1)]
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(2):
            own = free_port()
            words = ("--port", own, "--port-end", own + 20, "--tracker", address, "--key", KEY)
            processes.append(start("tvm.exec.rpc_server", *host, *words))
        wait_for_servers(address, 2)
        yield address, processes[1:]
    finally:
        for process in processes:
            end(process)


def wait_for_servers(address: str, count: int) -> None:
    limit = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < limit:
        try:
            if len(RpcMeasurer(address, KEY, wait=0).workers) == count:
                return
        except TuningError:
            pass
        time.sleep(0.3)
    pytest.fail(f"{count} servers did not start within {STARTS_WITHIN:.0f} s")


def num_trials(path: Path) -> int:
    file = path / "records.jsonl"
    return file.read_text().count('"kind": "trial"') if file.exists() else 0


def test_a_session_survives_the_loss_of_a_server(
    farm: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, servers = farm
    killed_after: list[int] = []

    def kill_one() -> None:
        while num_trials(tmp_path) < 2:
            time.sleep(0.05)
        killed_after.append(num_trials(tmp_path))
        end(servers[0])

    threading.Thread(target=kill_one, daemon=True).start()
    model, x = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96)).eval(), torch.randn(4, 96)
    result = ts.tune(
        model, (x,), work_dir=tmp_path, trials=4, rpc_tracker=address, rpc_key=KEY, timeout=TIMEOUT, quiet=True
    )
    total = sum(len(progress.trials) for progress in result.progress)
    assert killed_after and killed_after[0] < total, "the server was killed in the middle"
    for progress in result.progress:
        assert progress.best is not None and progress.ratio is not None and progress.ratio >= 1
        assert all(trial.seconds for trial in progress.trials), [trial.error for trial in progress.trials]


def test_a_key_without_servers_and_a_tracker_that_is_none_are_said_to_be_so(
    farm: tuple[str, list[subprocess.Popen[bytes]]],
) -> None:
    address, _ = farm
    with pytest.raises(TuningError, match="no server with key 'other' is registered"):
        RpcMeasurer(address, "other", wait=0)
    with pytest.raises(TuningError, match="no RPC tracker answers"):
        RpcMeasurer(f"127.0.0.1:{free_port()}", KEY, wait=0)
