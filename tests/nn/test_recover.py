"""recover: outputs of structured layers come back to those of the dense ones, from inputs alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tvm_structured.errors import ModelError
from tvm_structured.nn import StructuredLinear, convert, recover
from tvm_structured.structures import STRUCTURES, as_layer


def gap_between(model, dense, x):
    """How far the outputs are apart, relative to the dense ones."""
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 24), nn.ReLU(),
        nn.Linear(24, 10),
    )  # fmt: skip


def images(count=96):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def size_of(name, weight):
    layer, family = as_layer(weight), STRUCTURES[name]
    sizes = [size for _, size in zip(range(4), family.sizes(layer), strict=False)] if family.takes(layer) else []
    return dict(sizes[-1]) if sizes else None


@pytest.mark.parametrize("name", [name for name, family in STRUCTURES.items() if not family.is_lossless])
def test_every_structure_comes_nearer_layer_by_layer(name):
    dense, choices = network(), {}
    for path in ("0", "4"):
        size = size_of(name, dense.get_submodule(path).weight)
        if size is not None:
            choices[path] = (name, size)
    model = convert(dense, choices)
    x = images()
    gap = gap_between(model, dense, x)
    found = recover(model, dense, x, steps=15, progress=False)
    assert list(found.after) == [f"{path}.weight" for path in choices]
    assert all(after < before for after, before in zip(found.after.values(), found.before.values(), strict=True))
    assert gap_between(model, dense, x) < 1.1 * gap  # what is promised is the layers' outputs


def test_errors_are_those_of_the_layers_outputs():
    dense = nn.Sequential(nn.Linear(12, 8))
    model = convert(dense, {"0": ("low_rank", {"rank": 2})})
    x = torch.randn(50, 12)
    expected = gap_between(model, dense, x)
    found = recover(model, dense, x, steps=30, progress=False)
    assert found.before["0.weight"] == pytest.approx(expected, rel=1e-4)
    assert found.after["0.weight"] == pytest.approx(gap_between(model, dense, x), rel=1e-3)
    assert str(found).startswith("0.weight  output error")


def test_linear_families_reach_least_squares():
    """Block-circulant is linear in its numbers: the best fit is known."""
    torch.manual_seed(0)
    dense = nn.Linear(8, 8)
    model = convert(dense, {"weight": ("block_circulant", {"block": 8})})
    x = torch.randn(200, 8) @ torch.randn(8, 8)
    recover(model, dense, x, steps=200, progress=False)
    y = dense(x).detach().double()
    # y[a] = sum_d c[d] x[(a - d) mod 8] + b[a]
    columns = torch.stack([x.double().roll(d, 1) for d in range(8)], -1).reshape(-1, 8)
    design = torch.cat([columns, torch.eye(8, dtype=torch.float64).repeat(200, 1)], 1)
    best = design @ torch.linalg.lstsq(design, y.reshape(-1, 1)).solution
    found = float((model(x).detach().double() - y).norm())
    assert found <= 1.001 * float((best[:, 0] - y.reshape(-1)).norm())


def test_a_member_is_not_disturbed():
    dense = nn.Sequential(nn.Linear(12, 12))
    planted = STRUCTURES["low_rank"].from_dense(as_layer(dense[0].weight.detach()), rank=2)
    dense[0].weight.data = torch.from_numpy(planted.dense())
    model = convert(dense, {"0": planted})
    found = recover(model, dense, torch.randn(40, 12), progress=False)
    assert found.after["0.weight"] <= found.before["0.weight"] < 1e-5


def test_modes_dense_model_and_frozen_layers_are_left_as_they_were():
    dense = network().eval()
    model = convert(dense, 0.5).train()
    model[2].eval()
    frozen = model[4]
    frozen.requires_grad_(False)
    before, kept = copy.deepcopy(dense.state_dict()), copy.deepcopy(frozen.state_dict())
    found = recover(model, dense, images(16), steps=3, progress=False)
    assert "4.weight" not in found.after
    assert model.training and not model[2].training and not dense.training
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert all(torch.equal(value, kept[key]) for key, value in frozen.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_runs_twice_is_matched_on_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 10)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    torch.manual_seed(0)
    dense = Twice()
    model = convert(dense, {"fc": ("low_rank", {"rank": 3})})
    x = torch.randn(60, 10)
    gap = gap_between(model, dense, x)
    recover(model, dense, [x[:30], x[30:]], progress=False)
    assert gap_between(model, dense, x) < gap


def test_models_that_do_not_belong_together_are_refused():
    with pytest.raises(ModelError, match="no structured layer to recover"):
        recover(network(), network(), images(4), progress=False)
    model = nn.Sequential(nn.Identity(), StructuredLinear(12, 12, "low_rank", rank=2))
    with pytest.raises(ModelError, match="no layer '1'"):
        recover(model, nn.Sequential(nn.Identity()), torch.randn(4, 12), progress=False)
