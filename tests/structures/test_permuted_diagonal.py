"""Permuted diagonal beyond what test_conformance asks of every family."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import Budget, as_layer
from tvm_structured.structures.permuted_diagonal import PermutedDiagonal


def reference_dense(diagonals, shifts, out, inner, taps=1):
    """The definition, entry by entry."""
    rows, columns, p = diagonals.shape
    width = inner // taps
    matrix = np.zeros((out, inner))
    for i, j, c in itertools.product(range(rows), range(columns), range(p)):
        tap, block = divmod(j, columns // taps)
        row, column = i * p + c, block * p + (c + shifts[i, j]) % p
        if row < out and column < width:
            matrix[row, tap * width + column] = diagonals[i, j, c]
    return matrix


def random_member(out, inner, p, taps=1, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = -(-out // p), taps * -(-inner // taps // p)
    shifts = rng.integers(0, p, (rows, columns))
    return PermutedDiagonal((out, inner), taps, rng.standard_normal((rows, columns, p)), shifts)


@pytest.mark.parametrize(
    ("out", "inner", "p", "taps"), [(12, 12, 3, 1), (7, 11, 4, 1), (20, 30, 10, 1), (9, 45, 2, 9), (4, 27, 5, 9)]
)
def test_dense_and_apply_follow_the_definition(out, inner, p, taps):
    member = random_member(out, inner, p, taps)
    expected = reference_dense(member.diagonals, member.shifts, out, inner, taps)
    np.testing.assert_array_equal(member.dense(), expected)
    x = np.random.default_rng(1).standard_normal((3, inner))
    np.testing.assert_allclose(member.apply(x), x @ expected.T, atol=1e-12)


def test_operations_are_two_for_every_diagonal_entry():
    member = random_member(20, 30, 5)
    assert member.num_params == np.count_nonzero(member.dense()) == 120
    assert member.flops(7) == 7 * 2 * 120


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([1, 4, 9]), st.integers(2, 12), st.integers(0, 9))
def test_best_shift_beats_every_other_shift(out, width, taps, p, seed):
    """Brute force over all shifts of all blocks is never nearer."""
    if p > max(2, out, width):
        return
    rng = np.random.default_rng(seed)
    kernel = {1: (1, 1), 4: (2, 2), 9: (3, 3)}[taps]
    layer = as_layer(rng.standard_normal((out, width, *kernel)))
    member = PermutedDiagonal.from_dense(layer, block=p)
    kept = np.square(member.diagonals).sum(axis=2)
    for shift in range(p):
        same = PermutedDiagonal(member.shape, taps, np.ones_like(member.diagonals), np.full_like(member.shifts, shift))
        energy = np.square(layer.matrix * same.dense()).reshape(out, taps, width)
        grid = np.zeros((member.shifts.shape[0] * p, taps, -(-width // p) * p))
        grid[:out, :, :width] = energy
        per_block = grid.reshape(member.shifts.shape[0], p, member.shifts.shape[1], p).sum(axis=(1, 3))
        assert (kept >= per_block - 1e-9).all()


@pytest.mark.parametrize(("shape", "p"), [((12, 20), 4), ((7, 11), 3), ((50, 30), 10), ((6, 8, 3, 3), 4)])
def test_natural_indexing_counts_the_blocks(shape, p):
    layer = as_layer(np.random.default_rng(0).standard_normal(shape))
    member = PermutedDiagonal.from_dense(layer, block=p, indexing="natural")
    rows, columns = member.shifts.shape
    assert [[(i * columns + j) % p for j in range(columns)] for i in range(rows)] == member.shifts.tolist()
    kept = member.dense() != 0
    np.testing.assert_array_equal(member.dense()[kept], layer.matrix[kept])
    assert member.error(layer) >= PermutedDiagonal.from_dense(layer, block=p).error(layer)


@pytest.mark.parametrize("p", [2, 3, 5, 7, 8, 10, 12, 16, 25, 60])
@pytest.mark.parametrize("shape", [(120, 180), (117, 181), (60, 64, 3, 3)])
def test_any_block_length_is_detected(shape, p):
    layer = as_layer(np.random.default_rng(p).standard_normal(shape).astype(np.float32))
    planted = layer.with_matrix(PermutedDiagonal.from_dense(layer, block=p).dense())
    found = PermutedDiagonal.detect(planted)
    assert found is not None and found.block == p
    np.testing.assert_array_equal(found.dense(), planted.matrix)


def test_detection_takes_the_smallest_of_nested_members():
    """A member with blocks of 12 also is one with blocks of 6, 4, 3 and 2."""
    matrix = random_member(48, 48, 12).dense()
    assert PermutedDiagonal.detect(matrix).block == 12
    for p in (6, 4, 3, 2):
        assert PermutedDiagonal.from_dense(as_layer(matrix), block=p).error(matrix) == 0
    assert PermutedDiagonal.from_dense(as_layer(matrix), block=8).error(matrix) > 0.1


def test_blocks_of_zeros_are_members():
    member = random_member(40, 40, 8)
    member.diagonals[1] = 0
    member.diagonals[:, 2] = 0
    matrix = member.dense()
    found = PermutedDiagonal.detect(matrix)
    assert found is not None and found.num_params <= member.num_params
    np.testing.assert_array_equal(found.dense(), matrix)
    nothing = PermutedDiagonal.detect(np.zeros((40, 40), np.float32))
    assert nothing is not None and nothing.block == 40 and not nothing.dense().any()


def test_detection_bears_noise_below_the_tolerance():
    matrix = random_member(200, 160, 10).dense()
    noisy = matrix + 1e-7 * np.random.default_rng(3).standard_normal(matrix.shape)
    assert PermutedDiagonal.detect(noisy).block == 10
    assert PermutedDiagonal.detect(matrix + 1e-3) is None


@pytest.mark.parametrize(
    ("fraction", "p"), [(0.5, 2), (0.34, 3), (0.25, 4), (0.2, 5), (0.125, 8), (0.1, 10), (0.02, 50)]
)
def test_projection_hits_any_fraction(fraction, p):
    layer = as_layer(np.random.default_rng(0).standard_normal((600, 400)))
    member = PermutedDiagonal.project(layer, fraction)
    assert member.block == p
    assert member.num_params <= fraction * layer.num_params


@settings(max_examples=25)
@given(seed=st.integers(0, 999), fraction=st.floats(0.05, 1), limit=st.floats(0.05, 1))
def test_search_finds_what_trying_every_block_finds(seed, fraction, limit):
    """The bounds that skip block lengths skip no answer: against the plain loop of the base class."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 30, 2))
    weight = rng.standard_normal(shape) * (rng.random(shape) < rng.choice([0.05, 0.3, 1.0]))
    layer = as_layer(weight)
    every = [PermutedDiagonal.from_dense(layer, **size) for size in PermutedDiagonal.sizes(layer)]
    for budget in (Budget(max_params=fraction), Budget(max_params=fraction, max_error=limit)):
        found = PermutedDiagonal.project(layer, budget)
        small = [m for m in every if m.num_params <= fraction * layer.num_params]
        if budget.max_error is None:
            best = min((m.error(layer) for m in small), default=None)
            assert (found is None) == (best is None)
            assert found is None or found.error(layer) <= best + 1e-6
        else:
            first = next((m for m in small if m.error(layer) <= limit), None)
            assert (found is None) == (first is None)
            assert found is None or found.num_params == first.num_params
    exact = next((m for m in every if m.error(layer) <= 1e-5), None)
    detected = PermutedDiagonal.detect(layer)
    assert (detected is None) == (exact is None)
    assert detected is None or detected.num_params == exact.num_params


def test_detection_of_a_dense_weight_tries_no_block(monkeypatch):
    """One sort of its rows shows that a random weight is no member: else each of 1023 blocks would be tried."""
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    monkeypatch.setattr(PermutedDiagonal, "from_dense", lambda *_, **__: pytest.fail("tried a block"))
    assert PermutedDiagonal.detect(weight) is None


@pytest.mark.parametrize("block", [0, 1, -3, 13, 2.0, True, "8"])
def test_impossible_blocks_are_refused(block):
    with pytest.raises(ModelError, match=r"fc1: block=.* is outside 2\.\.12"):
        PermutedDiagonal.from_dense(as_layer(np.ones((8, 12)), "fc1"), block=block)


def test_unknown_indexing_is_refused():
    with pytest.raises(ModelError, match=r"indexing='random'.*best.*natural"):
        PermutedDiagonal.from_dense(as_layer(np.ones((8, 12))), block=4, indexing="random")


def test_factors_of_another_shape_are_refused():
    member = random_member(12, 12, 4)
    with pytest.raises(ModelError, match=r"diagonals \(3, 3, 4\)"):
        PermutedDiagonal.from_factors(member.sizes_of, [member.diagonals[:2], member.shifts])
    with pytest.raises(ModelError, match="12 features"):
        member.apply(np.ones((2, 11)))


def test_gradient_of_the_diagonals_is_the_dense_gradient_along_them():
    member = random_member(20, 30, 5)
    diagonals = torch.tensor(member.diagonals, requires_grad=True)
    x = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = PermutedDiagonal((20, 30), 1, diagonals, torch.tensor(member.shifts)).apply(x)
    ((y - target) ** 2).sum().backward()
    weight = torch.tensor(member.dense(), requires_grad=True)
    ((x @ weight.T - target) ** 2).sum().backward()
    expected = (
        PermutedDiagonal((20, 30), 1, np.ones_like(member.diagonals), member.shifts).dense() * weight.grad.numpy()
    )
    held = PermutedDiagonal((20, 30), 1, diagonals.grad.numpy(), member.shifts).dense()
    np.testing.assert_allclose(held, expected, atol=1e-10)


def test_apply_gathers_large_layers_in_pieces(monkeypatch):
    from tvm_structured.structures import permuted_diagonal

    member = random_member(30, 40, 4)
    x = np.random.default_rng(2).standard_normal((5, 40))
    whole = member.apply(x)
    monkeypatch.setattr(permuted_diagonal, "GATHERED", 100)
    np.testing.assert_allclose(member.apply(x), whole, atol=1e-12)


# -- products in torch ----------------------------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch):
    """Small matrices, too, are multiplied as sparse ones."""
    monkeypatch.setattr("tvm_structured.structures.permuted_diagonal.SMALL", 0)


def in_torch(member, dtype=torch.float64, requires_grad=False):
    diagonals = torch.tensor(member.diagonals, dtype=dtype, requires_grad=requires_grad)
    return PermutedDiagonal(member.shape, member.taps, diagonals, torch.tensor(member.shifts))


@pytest.mark.usefixtures("sparse")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 15), st.sampled_from([1, 3]), st.integers(2, 9), st.integers(0, 5))
def test_sparse_products_follow_the_definition(out, width, taps, p, rows):
    member = random_member(out, width * taps, p, taps)
    x = np.random.default_rng(1).standard_normal((rows, width * taps))
    expected = x @ reference_dense(member.diagonals, member.shifts, out, width * taps, taps).T
    np.testing.assert_allclose(in_torch(member).apply(torch.from_numpy(x)).numpy(), expected, atol=1e-12)
    np.testing.assert_array_equal(in_torch(member).dense().numpy(), member.dense())


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize(("out", "inner", "p", "taps"), [(12, 12, 3, 1), (7, 11, 4, 1), (9, 18, 2, 3)])
def test_gradients_of_sparse_products_are_those_of_finite_differences(out, inner, p, taps):
    member = random_member(out, inner, p, taps)
    x = torch.randn(4, inner, dtype=torch.float64, requires_grad=True)
    diagonals = torch.tensor(member.diagonals, requires_grad=True)
    shifts = torch.tensor(member.shifts)

    def product(x, diagonals):
        return PermutedDiagonal(member.shape, taps, diagonals, shifts).apply(x)

    assert torch.autograd.gradcheck(product, (x, diagonals))
    assert torch.autograd.gradcheck(lambda d: PermutedDiagonal(member.shape, taps, d, shifts).dense(), (diagonals,))


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_products_keep_the_type(dtype):
    member = random_member(24, 32, 4)
    x = torch.randn(3, 32)
    expected = in_torch(member).apply(x.double())
    found = in_torch(member, dtype).apply(x.to(dtype))
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_torch(member, torch.float32).apply(x).isfinite().all()


@pytest.mark.usefixtures("sparse")
def test_shifts_that_change_in_place_are_seen():
    """As when a state is loaded into a module."""
    member, other = random_member(12, 16, 4), random_member(12, 16, 4, seed=7)
    held, x = in_torch(member), torch.randn(2, 16, dtype=torch.float64)
    held.apply(x)
    held.shifts.copy_(torch.tensor(other.shifts))
    expected = PermutedDiagonal(member.shape, 1, member.diagonals, other.shifts).apply(x.numpy())
    np.testing.assert_allclose(held.apply(x).numpy(), expected, atol=1e-12)
