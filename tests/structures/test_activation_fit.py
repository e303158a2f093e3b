"""Members refitted to activations: against least squares over all members, and the optimality of Eckart and Young."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, as_layer
from tvm_structured.structures.activation_fit import checked_moments
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.low_rank import LowRank


def problem(out, inner, seed=0):
    """(layer, second moments of correlated inputs)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * inner, inner)) @ rng.standard_normal((inner, inner))
    return as_layer(rng.standard_normal((out, inner))), x.T @ x / len(x)


def best_circulant(layer, moments, member):
    """Least squares over the defining vectors, written out."""
    root = np.linalg.cholesky(checked_moments(layer, moments))
    unit = np.eye(member.c.size).reshape(-1, *member.c.shape)
    columns = [(BlockCirculant(member.shape, member.taps, c).dense() @ root).reshape(-1) for c in unit]
    solution = np.linalg.lstsq(np.stack(columns, 1), (layer.matrix @ root).reshape(-1), rcond=None)[0]
    return BlockCirculant(member.shape, member.taps, solution.reshape(member.c.shape))


@settings(max_examples=25)
@given(st.integers(2, 13), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(2, 7), st.integers(0, 9))
def test_no_block_circulant_matrix_is_nearer_in_the_outputs(out, width, taps, n, seed):
    layer, moments = problem(out, width * taps, seed)
    member = BlockCirculant.from_dense(layer, block=n, taps=taps)
    refitted = member.refit(layer, moments)
    best = best_circulant(layer, moments, member).output_error(layer, moments)
    assert refitted.c.shape == member.c.shape
    assert refitted.output_error(layer, moments) == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=25)
@given(st.integers(2, 14), st.integers(2, 14), st.integers(1, 6), st.integers(0, 9))
def test_low_rank_leaves_out_the_smallest_outputs(out, inner, rank, seed):
    rank = min(rank, out, inner)
    layer, moments = problem(out, inner, seed)
    singular = np.linalg.svd(layer.matrix @ np.linalg.cholesky(checked_moments(layer, moments)), compute_uv=False)
    least = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
    refitted = LowRank.from_dense(layer, rank=rank).refit(layer, moments)
    assert refitted.rank == rank
    assert refitted.output_error(layer, moments) == pytest.approx(least, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["block_circulant", "low_rank"])
def test_white_inputs_change_nothing(name):
    layer, _ = problem(12, 12)
    size = next(iter(STRUCTURES[name].sizes(layer)))
    member = STRUCTURES[name].from_dense(layer, **size)
    np.testing.assert_allclose(member.refit(layer, np.eye(12)).dense(), member.dense(), atol=1e-10)


@pytest.mark.parametrize("moments", [np.eye(5), np.full((6, 6), np.nan), -np.eye(6), np.ones(6)])
def test_what_are_no_second_moments_is_refused(moments):
    layer, _ = problem(4, 6)
    with pytest.raises(ModelError, match="second moments of 6 inputs"):
        LowRank.from_dense(layer, rank=2).refit(layer, moments)
