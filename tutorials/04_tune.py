"""Tune a model: a session that can be stopped, its database, and what it brought.

    python tutorials/04_tune.py [trials]

Takes a minute or two with the default of 4 trials for each kernel; 64 are usual.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tvm_structured as ts
from tvm_structured.tuning.maintenance import rows

TRIALS = int(sys.argv[1]) if len(sys.argv) > 1 else 4

# --- 1. A model ---------------------------------------------------------------------------------------------------
# One layer has a structure (8 x 8 circulant blocks), one is plain, and the softmax between them has no kernel of ours.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 768), nn.Softmax(-1), nn.Linear(768, 256)).eval().requires_grad_(False)
planted = ts.STRUCTURES["block_circulant"].from_dense(ts.Dense("0.weight", model[0].weight.numpy()), block=8)
model[0].weight.data = torch.from_numpy(planted.dense())
x = torch.randn(16, 512)
before = ts.compile(model, inputs=(x,), target="host")

# --- 2. A session -------------------------------------------------------------------------------------------------
# Every kernel has a space of configurations around the one that was chosen by hand: register blocks, tiles, threads,
# the domain to compute in. The hand schedule is the first trial, so nothing can become slower. Functions without a
# kernel are scheduled by MetaSchedule. The directory is the database: stop the session whenever you like (Ctrl-C, or
# worse), and the same call goes on where it was. Here the first call has no time for more than a start.

work_dir = Path(tempfile.mkdtemp()) / "tuning"
started = ts.tune(model, (x,), "host", work_dir, trials=TRIALS, time_budget=1, quiet=True)
print(f"after a second: {sum(len(task.trials) for task in started.progress)} trials\n")
result = ts.tune(model, (x,), "host", work_dir, trials=TRIALS)  # prints what improved and what did not

# --- 3. Use it ----------------------------------------------------------------------------------------------------
# The same records decide which form a layer takes, and how its kernel is built; `relay.build` finds them with
# `with ts.options(database=work_dir)`, the shell with `tvm-structured compile --database`.

after = ts.compile(model, inputs=(x,), target="host", database=work_dir)
assert torch.allclose(after(x), model(x), atol=1e-4)
print("\nlayer       by hand      tuned")
for old, new in zip(before.report().rows, after.report().rows, strict=True):
    print(f"{old.layer:<10}{old.seconds * 1e6:6.1f} us {new.seconds * 1e6:7.1f} us  {new.structure}")
print(f"{'model':<10}{before.time(x) * 1e6:6.1f} us {after.time(x) * 1e6:7.1f} us")

# --- 4. Look into the database ------------------------------------------------------------------------------------
# A copy on another machine works as well. Records say for which target, TVM and kernel version they hold; others are
# passed over. The shell has `tvm-structured db list`, `merge` and `prune`.

database = ts.Database(work_dir)
for row in rows(database):
    print(f"{row.what}: {row.trials} trials on {row.target}, {row.ratio:.2f}x of the hand schedule")
assert all(row.ratio >= 1 for row in rows(database))
any_cpu = {"kind": "llvm", "mcpu": "generic"}
other_target = ts.compile(model, inputs=(x,), target=any_cpu, measure=False, database=work_dir)  # says what it ignores
assert torch.allclose(other_target(x), model(x), atol=1e-4)

# --- 5. More machines ---------------------------------------------------------------------------------------------
# TVM's own tracker and servers measure elsewhere, and for other targets than this machine's:
#
#     python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190
#     python -m tvm.exec.rpc_server --tracker TRACKER:9190 --key lab            # on every machine that measures
#     tvm-structured tune model.onnx --work-dir db --rpc-tracker TRACKER:9190 --rpc-key lab
