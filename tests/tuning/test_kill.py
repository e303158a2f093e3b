"""kill -9 in the middle of a real session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tvm_structured as ts

SCRIPT = """
import sys, torch, tvm_structured as ts
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(96, 160), nn.ReLU(), nn.Linear(160, 96)).eval()
ts.tune(model, (torch.randn(4, 96),), work_dir=sys.argv[1], trials=16, seed=5)
"""


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.tune
def test_a_killed_session_goes_on_where_it_was(tmp_path: Path) -> None:
    first = start(tmp_path / "db")
    records = tmp_path / "db" / "records.jsonl"
    while not records.exists() or records.read_text().count('"kind": "trial"') < 3:
        assert first.poll() is None, "the session ended before it could be killed"
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()  # also closes its output
    before = ts.Database(tmp_path / "db").trials
    second = start(tmp_path / "db")
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0 and "geometric mean" in output
    after = ts.Database(tmp_path / "db")
    assert after.trials[: len(before)] == before, "what was measured is kept"
    assert len({(trial.origin, trial.text) for trial in after.trials}) == len(after.trials), "and not measured again"
    assert len(after.bests) == 2 and all(best.trials == 16 for best in after.bests)
