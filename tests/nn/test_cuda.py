"""Structured modules on a GPU: the same numbers and gradients, mixed precision, compiled, trained, and brought back."""

from __future__ import annotations

import copy

import pytest
import torch
from structure_samples import make_layer, some_sizes, works_on_images
from torch import nn

from tvm_structured.nn import StructuredConv2d, StructuredLinear, convert, fine_tune, recover
from tvm_structured.structures import STRUCTURES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def some_module(name, **options):
    """(module on the CPU, input) of a family: a dense layer, or a convolution where it has no dense members."""
    torch.manual_seed(0)
    family = STRUCTURES[name]
    if works_on_images(family):
        size = some_sizes(family, make_layer((12, 8, 3, 3)), 1)[0]
        return StructuredConv2d(8, 12, 3, name, **options, **size), torch.randn(4, 8, 9, 7)
    size = some_sizes(family, make_layer((400, 600)), 2)[-1]
    return StructuredLinear(600, 400, name, **options, **size), torch.randn(5, 600)


def gradients(module, x):
    y = module(x)
    return y, torch.autograd.grad(y.float().square().mean(), list(module.parameters()))


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_and_gradients_are_those_of_the_cpu(name):
    module, x = some_module(name)
    expected, wanted = gradients(module, x)
    found, got = gradients(copy.deepcopy(module).cuda(), x.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STRUCTURES)
def test_mixed_precision_stays_near(name, dtype):
    module, x = some_module(name)
    expected = module(x).detach()
    module, x = module.cuda(), x.cuda()
    with torch.autocast("cuda", dtype=dtype):
        found, got = gradients(module, x)
    assert float((found.float().cpu() - expected).norm() / expected.norm()) < 0.05
    assert all(torch.isfinite(g).all() for g in got)
    low = copy.deepcopy(module).to(dtype)
    assert float((low(x.to(dtype)).float().cpu() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("name", STRUCTURES)
def test_made_on_the_device_and_brought_back(name):
    module, x = some_module(name, device="cuda")
    member = module.to_structure()
    assert all(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))
    found = module.cpu()(x)
    again = copy.deepcopy(module)
    again.reset_parameters()
    again.load_state_dict(module.cuda().state_dict())
    torch.testing.assert_close(again(x), found)
    assert member.shape == module.to_structure().shape


@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_training_is_the_eager_one(name):
    module, x = some_module(name, device="cuda")
    x = x.cuda()
    expected, wanted = gradients(module, x)
    found, got = gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_whole_loop_on_the_device(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randint(0, 4, (256,))
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4)).cuda()
    fine_tune(dense, (x, y), epochs=3, progress=False)
    small = convert(dense, {"0": ("permuted_diagonal", {"block": 4})}, calibration=x)
    found = recover(small, dense, x, steps=10, progress=False)
    assert found.after["0.weight"] < found.before["0.weight"]
    again = copy.deepcopy(small)
    record = fine_tune(small, (x, y), teacher=dense, epochs=3, checkpoint=tmp_path / "a.ckpt", progress=False)
    assert next(small.parameters()).is_cuda and record.losses[-1] < record.losses[0]
    assert fine_tune(again, (x, y), teacher=dense, epochs=3, checkpoint=tmp_path / "a.ckpt", progress=False).losses
    assert torch.equal(again[0].diagonals, small[0].diagonals)
