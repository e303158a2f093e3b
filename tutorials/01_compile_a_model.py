"""Compile a model: from a torch module to a verified, exported library.

    python tutorials/01_compile_a_model.py

Everything here runs in a few seconds and needs no data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tvm_structured as ts

# --- 1. A model whose weights have structure ------------------------------------------------------------------
# Structure may come from training with `ts.nn`, from somebody else's code, or by luck. Here we plant it: the first
# layer gets a matrix of 8 x 8 circulant blocks, written out densely as any framework would store it.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
planted = ts.STRUCTURES["block_circulant"].from_dense(ts.Dense("0.weight", model[0].weight.detach().numpy()), block=8)
model[0].weight.data = torch.from_numpy(planted.dense())
x = torch.randn(16, 512)

# --- 2. Look before compiling ---------------------------------------------------------------------------------
# `inspect` changes nothing. It names the structure a weight has, and says how near it is to every other form.

inspection = ts.inspect(model, inputs=(x,))
print(inspection)
assert inspection["0.weight"].found.name == "block_circulant"

# --- 3. Compile -----------------------------------------------------------------------------------------------
# Without a budget only structure that is really there is used, so the result equals the model: the safe default.
# "host" describes this machine to TVM; plain "llvm" is a baseline CPU without wide vectors. Every form is timed against
# the dense layer, and the faster one is taken.

compiled = ts.compile(model, inputs=(x,), target="host")
y = compiled(x)  # torch in, torch out
expected = model(x).detach()
print(compiled.report())
print(f"largest difference to PyTorch: {(y - expected).abs().max():.1e}")
assert torch.allclose(y, expected, atol=1e-4)

# --- 4. Trade accuracy for size -------------------------------------------------------------------------------
# A budget lets layers without structure be replaced by their nearest structured neighbour. The error column tells
# what that costs each weight; a random weight has no good neighbour, a trained one may have, or may be fine-tuned.

smaller = ts.compile(model, inputs=(x,), target="host", budget=ts.Budget(max_params=0.25))
print(smaller.report())

# --- 5. Edit the plan -----------------------------------------------------------------------------------------
# A plan is data: save it, read it, change it by hand, compile with it again.

folder = Path(tempfile.mkdtemp())
smaller.plan.save(folder / "plan.json")
plan = ts.Plan.load(folder / "plan.json")
again = ts.compile(model, inputs=(x,), target="host", plan=plan)
assert np.array_equal(again(x.numpy()), smaller(x.numpy()))  # numpy in, numpy out

# --- 6. Export and load ---------------------------------------------------------------------------------------
# The library holds weights and kernels; loading it needs only TVM's runtime.

library = compiled.export(folder / "model.so")
loaded = ts.load(library)
assert torch.equal(loaded(x), y)
print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, runs without torch: {loaded}")
