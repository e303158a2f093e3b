"""Deploy to the accelerator: train a small network, quantize it, run it on the simulated VTA, look at its cycles.

    python tutorials/05_vta.py

Training takes a few seconds; the data come with scikit-learn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import tvm_structured as ts
from tvm_structured.vta import VTAConfig

# --- 1. A digits network -----------------------------------------------------------------------------------------
# Two convolutions, a residual, pooling: what the accelerator is made for. 8 x 8 images, 1437 to train and 360 to test.


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.out = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        x = functional.max_pool2d(functional.relu(self.inner(x) + x), 2)
        x = functional.max_pool2d(functional.relu(self.wide(x)), 2)
        return self.out(x.flatten(1))


torch.manual_seed(0)
torch.set_num_threads(2)
images, labels = load_digits(return_X_y=True)
images = torch.from_numpy(images.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
labels = torch.from_numpy(labels)
order = torch.randperm(len(images))
train, test = order[:1437], order[1437:]

model = Digits()
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(12):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

# --- 2. Compile for the accelerator ------------------------------------------------------------------------------
# The accelerator computes in int8. Calibration observes the ranges of all activations on sample inputs; 200 images
# are plenty. What the accelerator cannot compute stays on the CPU; here that is the conversion at both ends.

x = images[test]
compiled = ts.compile(model, inputs=(x,), target="vta", calibration=images[train[:200]])


def accuracy(scores: torch.Tensor) -> float:
    return float((scores.argmax(1) == labels[test]).float().mean())


float_accuracy, int8_accuracy = accuracy(model(x)), accuracy(compiled(x))
print(f"accuracy: {100 * float_accuracy:.1f} % in float32, {100 * int8_accuracy:.1f} % on the accelerator")
assert abs(float_accuracy - int8_accuracy) <= 0.01

# --- 3. The same integers on the CPU -----------------------------------------------------------------------------
# `ts.quantize` gives the integer model itself. It is one definition: CPU and accelerator agree bit for bit.

integers = ts.quantize(model, (x,), images[train[:200]])
on_cpu, on_vta = ts.compile(integers, target="host"), ts.compile(integers, target="vta")
assert torch.equal(on_cpu(x), on_vta(x))

# --- 4. What it costs --------------------------------------------------------------------------------------------
# Counters are what the simulator executed; cycles come from a timing model of the published hardware.

compiled.clear_stats()
compiled(x)
print(compiled.vta_stats())

# --- 5. Another accelerator --------------------------------------------------------------------------------------
# Its parameters are those of VTA's configuration files. 4 images at a time and 64 KiB of weights:

other = VTAConfig(log_batch=2, log_wgt_buff_size=16, log_acc_buff_size=18)
larger = ts.compile(integers, target="vta", vta_config=other)
assert torch.equal(larger(x), on_vta(x))
print(f"modelled cycles: {on_vta.vta_stats().cycles:,} by default, {larger.vta_stats().cycles:,} with batches of 4")

# --- 6. Instructions ---------------------------------------------------------------------------------------------
# Every layer is a static program. It can be listed, dumped for a driver of real hardware, and drawn.

folder = Path(tempfile.mkdtemp())
print("\n".join(compiled.vta.listing("wide.weight").splitlines()[:6]))
compiled.vta.dump(folder / "programs")
picture = compiled.vta.timeline("wide.weight", folder / "wide.png")
print(f"load, compute and store over time: {picture.name}, {picture.stat().st_size} bytes")

# --- 7. Deploy ---------------------------------------------------------------------------------------------------
# The library holds programs, weights and the simulator, and needs only TVM's runtime.

library = compiled.export(folder / "digits.so")
assert torch.equal(ts.load(library)(x), compiled(x))
print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB")
