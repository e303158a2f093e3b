"""CP decomposition of kernels: planted components, integer factors, straight-through gradients."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import Budget, as_layer
from tvm_structured.structures.cp import CP
from tvm_structured.structures.cp_fit import distance, fit, integer_columns, khatri_rao, start

few = settings(max_examples=15)


def planted(shape: tuple[int, ...], rank: int, seed: int = 0, integers: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factors = [
        rng.integers(-100, 101, (extent, rank)) / 100 if integers else rng.standard_normal((extent, rank))
        for extent in shape
    ]
    return np.einsum("or,ir,yr,xr->oiyx", *factors)


@few
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 4), st.integers(0, 99))
def test_planted_components_are_recovered(out: int, inner: int, rank: int, seed: int) -> None:
    weight = planted((out, inner, 3, 3), rank, seed)
    assert CP.from_dense(as_layer(weight), rank=rank).error(weight) <= 1e-8


def test_integer_factors_are_recognised_and_the_result_is_exact() -> None:
    weight = planted((16, 12, 3, 3), 5, integers=True)
    found = CP.detect(weight)
    assert found is not None and (found.rank, found.bits) == (5, 8)
    assert found.error(weight) <= 1e-10
    for factor in found.values():
        np.testing.assert_array_equal(factor, np.rint(factor))
        assert np.abs(factor).max() <= 127
    assert CP.detect(planted((16, 12, 3, 3), 5)).bits == 0  # type: ignore[union-attr]


def test_rounding_within_the_sweeps_beats_rounding_behind_them() -> None:
    layer = as_layer(planted((16, 12, 3, 3), 6) + 0.05 * np.random.default_rng(9).standard_normal((16, 12, 3, 3)))
    for bits in (3, 4):
        within = CP.from_dense(layer, rank=6, bits=bits)
        real = CP.from_dense(layer, rank=6)
        columns = [real.outputs * real.scale, real.inputs, real.vertical, real.horizontal]
        behind = CP.of_columns(layer, columns, bits)
        assert within.error(layer) < behind.error(layer)
    assert CP.from_dense(layer, rank=6, bits=8).error(layer) <= 1.05 * real.error(layer)


def test_bytes_are_those_of_the_integers() -> None:
    layer = as_layer(planted((16, 12, 3, 3), 5).astype(np.float32))
    count = 5 * (16 + 12 + 3 + 3)
    for bits, width in ((0, 4), (4, 1), (8, 1), (9, 2), (16, 2)):
        member = CP.from_dense(layer, rank=5, bits=bits)
        assert member.num_params == count + 5
        assert member.num_bytes == width * count + 4 * 5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_integer_factors_of_half_precision_weights_do_not_vanish(scale: float, bits: int) -> None:
    weight = (scale * planted((16, 12, 3, 3), 4)).astype(np.float16)
    half, single = (CP.from_dense(as_layer(w), rank=4, bits=bits) for w in (weight, weight.astype(np.float32)))
    assert half.error(weight) == pytest.approx(single.error(weight), rel=1e-3)
    projected = CP.project(weight, 0.5)
    assert projected is not None and projected.error(weight) < 0.1


def test_a_kernel_of_higher_rank_is_not_begun_again(monkeypatch: Any) -> None:
    begun = []

    def counted(tensor: Any, rank: int, attempt: int) -> Any:
        begun.append(attempt)
        return start(tensor, rank, attempt)

    monkeypatch.setattr("tvm_structured.structures.cp_fit.start", counted)
    fit(np.random.default_rng(0).standard_normal((24, 20, 3, 3)), 4)
    assert begun == [0]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_integer_columns_stay_within_their_bits(bits: int) -> None:
    factor = np.random.default_rng(0).standard_normal((30, 5))
    factor[:, 2] = 0
    integers, scales = integer_columns(factor, bits)
    limit = 2 ** (bits - 1) - 1
    assert np.abs(integers).max() <= limit and (integers == np.rint(integers)).all()
    assert np.abs(integers * scales - factor).max() <= 0.5001 * scales.max()


def test_distance_and_khatri_rao_are_what_they_say() -> None:
    rng = np.random.default_rng(1)
    factors = [rng.standard_normal((extent, 3)) for extent in (4, 5, 2, 3)]
    tensor = rng.standard_normal((4, 5, 2, 3))
    assert distance(tensor, factors) == pytest.approx(np.linalg.norm(tensor - np.einsum("or,ir,yr,xr->oiyx", *factors)))
    np.testing.assert_allclose(khatri_rao(*factors[2:])[:, 1], np.kron(factors[2][:, 1], factors[3][:, 1]))


def test_sweeps_do_not_lose() -> None:
    tensor = np.random.default_rng(2).standard_normal((10, 8, 3, 3))
    errors = [distance(tensor, fit(tensor, 6, sweeps=count)) for count in (0, 1, 5, 40)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))


def test_gradients_pass_the_rounding() -> None:
    layer = as_layer(planted((6, 5, 3, 3), 3))
    member = CP.from_dense(layer, rank=3, bits=4)
    factors = [torch.tensor(np.asarray(array) + 0.2, requires_grad=True) for array in member.factors.values()]
    held = CP.from_factors(member.sizes_of, factors)
    held.dense().square().sum().backward()
    assert all(float(factor.grad.abs().sum()) > 0 for factor in factors)
    np.testing.assert_allclose(held.values()[0].detach(), np.rint(member.outputs + 0.2))


def test_project_gives_integer_factors_within_the_budget() -> None:
    layer = as_layer(np.random.default_rng(0).standard_normal((32, 24, 3, 3)))
    member = CP.project(layer, 0.2)
    assert member is not None and member.bits == 8 and member.num_params <= 0.2 * layer.num_params
    assert CP.project(layer, Budget(max_error=1e-3)) is None


@pytest.mark.parametrize("size", [{"rank": 0}, {"rank": 2, "bits": 1}, {"rank": 2, "bits": 17}])
def test_sizes_that_do_not_exist_are_refused(size: Any) -> None:
    with pytest.raises(ModelError, match=r"rank|bits"):
        CP.from_dense(as_layer(np.ones((4, 4, 3, 3))), **size)
