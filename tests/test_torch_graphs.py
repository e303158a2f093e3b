"""Layers that others wrote in torch, with transforms or with a weight that the forward pass builds, are found."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tvm_structured as ts
from tvm_structured.frontend import import_model
from tvm_structured.relay_passes.find_layers import find_layers
from tvm_structured.torch_graphs import simplify

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Blocks(nn.Module):
    """CirCNN as most write it: rfft, multiply, sum over the block columns, irfft."""

    def __init__(self, rows=3, columns=4, n=8):
        super().__init__()
        self.rows, self.columns, self.n = rows, columns, n
        self.w = nn.Parameter(torch.randn(rows, columns, n))
        self.b = nn.Parameter(torch.randn(rows * n))

    def forward(self, x):
        spectra = torch.fft.rfft(x.reshape(*x.shape[:-1], 1, self.columns, self.n))
        product = (spectra * torch.fft.rfft(self.w)).sum(-2)
        return torch.fft.irfft(product, n=self.n).flatten(-2) + self.b


class Spectral(nn.Module):
    """A padded input, weights that are trained as spectra, einsum, a cut output, orthonormal transforms."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.complex64))

    def forward(self, x):
        blocks = F.pad(x, (0, 2)).reshape(*x.shape[:-1], 4, 8)
        product = torch.einsum("pqk,...qk->...pk", self.w, torch.fft.rfft(blocks, norm="ortho"))
        return torch.fft.irfft(product, n=8, norm="ortho").flatten(-2)[..., :20]


class Convolved(nn.Module):
    """One circulant matrix through complex transforms, whose weight is held as (real, imaginary)."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(24, 2))

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(x) * torch.view_as_complex(self.spectrum)).real


class Rolled(nn.Module):
    """A circulant weight of rolled copies of a vector."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(24))

    def forward(self, x):
        return F.linear(x, torch.stack([torch.roll(self.c, shift) for shift in range(24)], 1))


class Indexed(nn.Module):
    """Circulant blocks by an index table."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(3, 3, 8))
        self.register_buffer("table", (torch.arange(8)[:, None] - torch.arange(8)) % 8)

    def forward(self, x):
        return x @ self.c[:, :, self.table].permute(0, 2, 1, 3).reshape(24, 24).T


class Scattered(nn.Module):
    """Permuted diagonals written into zeros."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(24, 6))
        shift = torch.tensor([[2, 0, 1, 3, 1, 0], [1, 1, 3, 2, 0, 2], [0, 3, 2, 2, 1, 3]] * 2)
        row = torch.arange(24)[:, None]
        self.register_buffer("column", torch.arange(6) * 4 + (row + shift[row[:, 0] // 4]) % 4)

    def forward(self, x):
        weight = torch.zeros(24, 24)
        weight[torch.arange(24)[:, None], self.column] = self.q
        return F.linear(x, weight)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(24, 2)), nn.Parameter(torch.randn(2, 24))

    def forward(self, x):
        return F.linear(x, self.u @ self.v)


WRITTEN = {
    "blocks": (Blocks, 32, "block_circulant", {"block": 8}, "layer.w"),
    "spectra": (Spectral, 30, "block_circulant", {"block": 8}, "layer.w"),
    "convolved": (Convolved, 24, "block_circulant", {"block": 24}, "layer.spectrum"),
    "rolled": (Rolled, 24, "block_circulant", {"block": 24}, "layer.c"),
    "indexed": (Indexed, 24, "block_circulant", {"block": 8}, "layer.c"),
    "scattered": (Scattered, 24, "permuted_diagonal", {"block": 4}, "layer.q"),
    "product": (Product, 24, "low_rank", {"rank": 2}, "layer.u"),
}


class Net(nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.first, self.layer = nn.Linear(10, width), layer

    def forward(self, x):
        return torch.tanh(self.layer(torch.relu(self.first(x))))


def network(name):
    make, width, *expected = WRITTEN[name]
    torch.manual_seed(0)
    return Net(make(), width).eval(), expected


def layers_of(model, x):
    """Layer name -> layer, as the compiler sees the model."""
    from tvm_structured.compiler import canonicalize

    return find_layers(canonicalize(import_model(model, (x,))))


@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_layer_written_by_others_has_its_structure(name, lead):
    model, (family, size, parameter) = network(name)
    layers = layers_of(model, torch.randn(*lead, 10))
    assert set(layers) == {"first.weight", parameter}
    member = ts.STRUCTURES[family].detect(layers[parameter])
    assert member is not None
    assert {key: getattr(member, key) for key in size} == size


@pytest.mark.parametrize("name", WRITTEN)
def test_the_compiled_model_equals_torch(name):
    model, _ = network(name)
    x = torch.randn(4, 10)
    compiled = ts.compile(model, (x,), target="host", measure=False)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_open_stays_open():
    model, _ = network("blocks")
    program = torch.export.export(model, (torch.randn(4, 10),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    compiled = ts.compile(program, target="host", measure=False)
    for rows in (1, 4, 9):
        x = torch.randn(rows, 10)
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_given_program_is_left_as_it_was():
    model, _ = network("scattered")
    program = torch.export.export(model, (torch.randn(4, 10),))
    graph, state = str(program.graph), copy.deepcopy(program.state_dict)
    assert simplify(program) is not program
    assert str(program.graph) == graph and program.state_dict.keys() == state.keys()


def test_a_program_without_such_layers_is_returned_itself():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(), (torch.randn(2, 4),))
    assert simplify(program) is program


class NotLinear(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(24))

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        weight = torch.fft.rfft(self.w)
        return torch.fft.irfft(self.how(spectrum, weight), n=24)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w: x * x * w,
        lambda x, w: x * x.abs() * w,
        lambda x, w: x * w + w,
        lambda x, w: (x * w).roll(1, 0),
        lambda x, w: x * w * torch.arange(1.0, 5.0)[:, None],
    ],
    ids=["square", "modulus", "affine", "mixes rows", "depends on the row"],
)
def test_what_is_no_dense_layer_is_left_alone(how):
    program = torch.export.export(NotLinear(how), (torch.randn(4, 24),))
    targets = [str(node.target) for node in simplify(program).graph.nodes]
    assert any("irfft" in target for target in targets) and not any("linear" in target for target in targets)


def test_a_buffer_that_the_model_writes_is_no_constant():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.ones(6, 6))

        def forward(self, x):
            self.state.add_(1.0)
            return F.linear(x, torch.roll(self.state, 1))

    program = torch.export.export(Counting(), (torch.randn(4, 6),))
    assert any("roll" in str(node.target) for node in simplify(program).graph.nodes)


def test_a_convolution_with_circulant_taps_is_found():
    class CircConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.randn(2, 3, 3, 3, 4))
            self.register_buffer("table", (torch.arange(4)[:, None] - torch.arange(4)) % 4)

        def forward(self, x):
            weight = self.c[..., self.table].permute(0, 4, 1, 5, 2, 3).reshape(8, 12, 3, 3)
            return F.relu(F.conv2d(x, weight, padding=1))

    torch.manual_seed(0)
    model, x = CircConv().eval(), torch.randn(2, 12, 6, 5)
    member = ts.STRUCTURES["block_circulant"].detect(layers_of(model, x)["c"])
    assert member is not None and (member.block, member.taps) == (4, 9)
    compiled = ts.compile(model, (x,), target="host", measure=False)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_weight_norm_is_a_plain_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), nn.ReLU()).eval()
    x = torch.randn(3, 12)
    compiled = ts.compile(model, (x,), target="host", measure=False)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert len(compiled.plan.choices) == 1


def test_random_numbers_are_not_frozen():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return F.linear(x, torch.roll(self.w, 1) * torch.rand_like(self.w))

    program = torch.export.export(Noisy(), (torch.randn(4, 6),))
    assert any("rand_like" in str(node.target) for node in simplify(program).graph.nodes)


def test_the_matrix_is_exact_to_rounding():
    model = Blocks(5, 7, 6)
    program = simplify(torch.export.export(model, (torch.randn(3, 42),)))
    (weight,) = (value for name, value in program.state_dict.items() if name == "w")
    c = model.w.detach().double().numpy()
    expected = np.zeros((30, 42))
    for i, j, a, b in np.ndindex(5, 7, 6, 6):
        expected[i * 6 + a, j * 6 + b] = c[i, j, (a - b) % 6]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-6)
