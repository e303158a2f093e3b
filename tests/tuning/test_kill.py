"""kill -9 in the middle of a session: nothing that was measured is lost, and it ends as if it had not been stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tuning_samples import FakeMeasurer, sample_task, weighted

import tvm_structured as ts
from tvm_structured.tuning.session import Session, origin_of

# A measurer whose times are known kills its own process after so many trials; the last record may be half written.
KNOWN_TIMES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tuning_samples import FakeMeasurer, weighted
from tvm_structured.tuning.database import Database
from tvm_structured.tuning.session import Session

path, trials, kill_after, cut = sys.argv[2], *map(int, sys.argv[3:])

class Killed(FakeMeasurer):
    def measure(self, task, configs, limit):
        for result in super().measure(task, configs, limit):
            if len(self.measured) > kill_after:
                if cut:
                    with open(os.path.join(path, "records.jsonl"), "rb+") as file:
                        file.truncate(file.seek(0, os.SEEK_END) - cut)
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

database = Database(path, must_exist=False)
with database.locked():
    Session(weighted("dense", "tensor_train"), database, Killed(), trials, seed=3).run()
"""


def outcome(path: Path) -> list[object]:
    """Of each task its trials and its winner."""
    database = ts.Database(path)
    origins = [origin_of(sample_task(name)) for name in ("dense", "tensor_train")]
    return [([trial.text for trial in database.history(o)], database.best(o)) for o in origins]


def finish(path: Path, trials: int) -> FakeMeasurer:
    database, measurer = ts.Database(path, must_exist=False), FakeMeasurer()
    with database.locked():
        Session(weighted("dense", "tensor_train"), database, measurer, trials, seed=3).run()
    return measurer


@pytest.mark.parametrize("kill_after, cut", [(5, 0), (19, 37)], ids=["first batch", "later, and a line cut off"])
def test_a_killed_session_ends_like_one_that_was_not(tmp_path: Path, kill_after: int, cut: int) -> None:
    trials, tests = 20, str(Path(__file__).parent.parent)
    whole = finish(tmp_path / "whole", trials)
    words = [tests, str(tmp_path / "killed"), *map(str, (trials, kill_after, cut))]
    done = subprocess.run([sys.executable, "-c", KNOWN_TIMES, *words], timeout=300, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    kept = len(ts.Database(tmp_path / "killed").trials)
    assert kept == kill_after - bool(cut), "one trial was in flight, and the record of another is half"
    rest = finish(tmp_path / "killed", trials)
    assert kept + len(rest.measured) == len(whole.measured) > trials, "no trial twice, none left out"
    assert sorted_trials(tmp_path / "killed") == sorted_trials(tmp_path / "whole")
    assert [best for _, best in outcome(tmp_path / "killed")] == [best for _, best in outcome(tmp_path / "whole")]


def sorted_trials(path: Path) -> list[list[str]]:
    return [sorted(texts) for texts, _ in outcome(path)]


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
