"""The trainable modules against the mathematics: values, gradients, initialisation, and what torch users do."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tvm_structured.errors import ModelError
from tvm_structured.nn import StructuredConv2d, StructuredLinear
from tvm_structured.structures import STRUCTURES, Conv2d, Dense

DENSE_SHAPES = [(12, 18), (18, 12), (30, 20), (13, 27)]
CONV_SHAPES = [(8, 6, 3, 3), (6, 8, 5, 5), (9, 5, 1, 3)]


def sizes_of(name, layer):
    """The first sizes that the family offers for the layer, none where it has no member."""
    family = STRUCTURES[name]
    return list(itertools.islice(family.sizes(layer), 64)) if family.takes(layer) else []


def ones(shape):
    """A layer of that weight shape: dense, or a convolution."""
    return (Dense if len(shape) == 2 else Conv2d)("weight", np.ones(shape, dtype=np.float32))


def members(shapes):
    """(family, shape) wherever the family has a member of that shape."""
    return [(name, shape) for name in STRUCTURES for shape in shapes if sizes_of(name, ones(shape))]


def a_size(name, layer):
    """A size from the middle of what the family offers for the layer."""
    sizes = sizes_of(name, layer)
    return dict(sizes[len(sizes) // 2])


def linear(name, shape=(12, 18), **options):
    torch.manual_seed(0)
    size = a_size(name, ones(shape))
    return StructuredLinear(shape[1], shape[0], name, **options, **size)


def conv(name, shape=(8, 6, 3, 3), **options):
    torch.manual_seed(0)
    size = a_size(name, ones(shape))
    return StructuredConv2d(shape[1], shape[0], shape[2:], name, **options, **size)


def some_module(name, **options):
    """A module of the family: dense where it has dense members, else a convolution. With an input for it."""
    if Dense in STRUCTURES[name].accepts:
        return linear(name, **options), torch.randn(5, 18)
    return conv(name, **options), torch.randn(2, 6, 9, 7)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("lead", [(7,), (), (2, 3), (0,)])
@pytest.mark.parametrize(("name", "shape"), members(DENSE_SHAPES), ids=str)
def test_linear_is_the_product_with_its_dense_matrix(name, shape, lead):
    module = linear(name, shape)
    x = torch.randn(*lead, shape[1])
    expected = x.numpy().astype(np.float64) @ module.to_structure().dense().T + module.bias.detach().numpy()
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), members(CONV_SHAPES), ids=str)
@settings(max_examples=12)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.integers(0, 3), st.tuples(*[st.integers(0, 3)] * 4), st.sampled_from(["valid"])),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_conv_is_torch_conv2d_with_its_dense_weight(name, shape, stride, padding, dilation, bias):
    placed = Conv2d("weight", np.ones(shape), stride=stride, dilation=(dilation, dilation))
    if not STRUCTURES[name].takes(placed):
        stride, dilation = (1, 1), 1
    module = conv(name, shape, stride=stride, padding=padding, dilation=dilation, bias=bias)
    out, channels, kh, kw = shape
    matrix = module.to_structure().dense().astype(np.float64)  # channel fastest
    weight = torch.from_numpy(matrix.reshape(out, kh, kw, channels).transpose(0, 3, 1, 2).copy())
    x = torch.randn(2, channels, 11, 10)
    top, left, bottom, right = module.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    offset = None if module.bias is None else module.bias.double()
    expected = F.conv2d(padded, weight, offset, stride, 0, dilation)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [3, (2, 4), (1, 5)])
def test_same_padding_is_that_of_torch(kernel):
    twin = torch.nn.Conv2d(6, 8, kernel, padding="same", dilation=2)
    module = StructuredConv2d(6, 8, kernel, "low_rank", padding="same", dilation=2, rank=2)
    with torch.no_grad():
        twin.weight.copy_(module.dense_weight())
        twin.bias.copy_(module.bias)
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x[0]), twin(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_are_those_of_finite_differences(name):
    module, x = some_module(name, dtype=torch.float64)
    x = x[:2].double().requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def loss(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(loss, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_equal_those_through_the_dense_weight(name):
    module, x = some_module(name)
    apply_dense = F.linear if isinstance(module, StructuredLinear) else F.conv2d
    wanted = [module.get_parameter(factor) for factor in module.trainable_names]
    upstream = torch.randn_like(module(x))
    found = torch.autograd.grad(module(x), wanted, upstream)
    expected = torch.autograd.grad(apply_dense(x, module.dense_weight(), module.bias), wanted, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_training_approaches_a_member_of_the_family(name):
    target, x = some_module(name)
    with torch.no_grad():
        goal = target(x)
    module = copy.deepcopy(target)
    torch.manual_seed(1)
    module.reset_parameters()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    losses = []
    while len(losses) < 200 and (not losses or losses[-1] >= 0.2 * losses[0]):  # products of many factors start slowly
        loss = F.mse_loss(module(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("name", "shape"), members([(60, 96), (96, 60), (48, 16, 3, 3), (8, 6, 3, 3)]), ids=str)
@torch.no_grad()
def test_initial_weights_have_the_mean_square_of_torch_layers(name, shape):
    module = linear(name, shape) if len(shape) == 2 else conv(name, shape)
    plain = torch.nn.Linear(600, 600) if len(shape) == 2 else torch.nn.Conv2d(60, 60, 3)
    fan_in = int(np.prod(shape[1:]))
    expected = float(plain.weight.square().mean()) * plain.weight[0].numel() / fan_in
    found = float(module.dense_weight().square().mean())
    assert found == pytest.approx(expected, rel=0.2)
    assert float(module.bias.abs().max()) <= fan_in**-0.5


@pytest.mark.parametrize(("name", "shape"), members([(96, 96)]), ids=str)
@torch.no_grad()
def test_initial_activations_keep_their_scale(name, shape):
    """Random inputs come out with a third of their mean square, as from torch.nn.Linear."""
    module = linear(name, shape, bias=False)
    assert float(module(torch.randn(4000, 96)).square().mean()) == pytest.approx(1 / 3, rel=0.2)


@pytest.mark.parametrize("name", STRUCTURES)
def test_initial_weights_come_from_the_seed_of_torch(name):
    first, _ = some_module(name)
    again, _ = some_module(name)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    again.reset_parameters()
    assert not torch.equal(first.dense_weight(), again.dense_weight())


@pytest.mark.parametrize("name", STRUCTURES)
def test_state_dict_round_trip_is_exact(name):
    module, x = some_module(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    other = copy.deepcopy(module)
    other.reset_parameters()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_copies_are_equal_and_independent(name):
    module, x = some_module(name)
    before = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), before)
        twin.reset_parameters()
        assert torch.equal(module(x), before)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_round_trip_is_exact(name):
    module, x = some_module(name)
    member = module.to_structure()
    assert type(member) is STRUCTURES[name]
    for key, array in member.factors.items():
        np.testing.assert_array_equal(array, getattr(module, key).detach().numpy())
    if isinstance(module, StructuredLinear):
        twin = StructuredLinear.from_structure(member, module.bias)
    else:
        twin = StructuredConv2d.from_structure(member, module.kernel_size, module.bias)
    assert torch.equal(twin(x), module(x))
    module.reset_parameters()
    assert torch.equal(torch.from_numpy(member.dense()), torch.from_numpy(twin.to_structure().dense()))


@pytest.mark.parametrize("name", STRUCTURES)
def test_only_trainable_factors_are_parameters(name):
    module, _ = some_module(name)
    member = module.to_structure()
    assert {key for key, _ in module.named_parameters()} == {*member.trainable_factors, "bias"}
    assert {key for key, _ in module.named_buffers()} == {*member.factors} - {*member.trainable_factors}
    half = copy.deepcopy(module).half()
    assert all(buffer.dtype == getattr(module, key).dtype for key, buffer in half.named_buffers())


@pytest.mark.parametrize("name", STRUCTURES)
def test_bfloat16_and_autocast_run_near_float32(name):
    module, x = some_module(name)
    expected = module(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        y.float().square().sum().backward()
    assert relative(y.detach().float(), expected) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    low = copy.deepcopy(module).bfloat16()
    assert relative(low(x.bfloat16()).detach().float(), expected) < 0.05
    assert all(array.dtype != object for array in low.to_structure().factors.values())


@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_module_trains_as_the_eager_one(name):
    module, x = some_module(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_weight_reads_like_that_of_a_dense_layer():
    module = linear("low_rank")
    assert module.weight.shape == (12, 18)
    np.testing.assert_allclose(module.weight.detach(), module.to_structure().dense(), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StructuredLinear(8, 8, "sparse_ish"), "no structure is called 'sparse_ish'"),
        (lambda: StructuredLinear(8, 8, "low_rank"), "missing a required argument: 'rank'.*rank=1"),
        (lambda: StructuredLinear(8, 8, "low_rank", rank=2, block=4), "unexpected keyword argument 'block'"),
        (lambda: StructuredLinear(8, 8, "low_rank", rank=9), "rank 9 is outside 1..8"),
        (lambda: StructuredConv2d(4, 4, 3, "low_rank", padding="full", rank=2), "padding='full' is unknown"),
    ],
)
def test_impossible_layers_are_refused_with_the_way_out(make, says):
    with pytest.raises(ModelError, match=says):
        make()


def test_member_that_does_not_fit_the_kernel_is_refused():
    member = StructuredLinear(10, 4, "low_rank", rank=2).to_structure()
    with pytest.raises(ModelError, match=r"does not fit a kernel of \(3, 3\)"):
        StructuredConv2d.from_structure(member, 3)


def test_winograd_is_refused_where_it_is_not_defined():
    with pytest.raises(ModelError, match=r"winograd is not defined for .* stride \(2, 2\)"):
        StructuredConv2d(4, 4, 3, "winograd", stride=2, tile=2)
    with pytest.raises(ModelError, match=r"winograd is not defined for a weight of shape \(4, 4\)"):
        StructuredLinear(4, 4, "winograd", tile=2)
    member = StructuredConv2d(4, 4, 3, "winograd", tile=2).to_structure()
    with pytest.raises(ModelError, match=r"winograd is not defined for .* dilation \(2, 2\)"):
        StructuredConv2d.from_structure(member, 3, dilation=2)
