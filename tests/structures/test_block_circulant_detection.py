"""Detection of block-circulant weights: planted ones are found, others are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import circulant
from structure_samples import random_circulant

from tvm_structured.structures import Conv2d
from tvm_structured.structures.block_circulant import BlockCirculant

few = settings(max_examples=25)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
blocks = st.integers(2, 45)


@pytest.mark.parametrize("block", [2, 5, 8, 10, 12, 20, 30, 64, 100])
def test_planted_blocks_of_any_length_are_detected_through_noise(block: int) -> None:
    rng = np.random.default_rng(block)
    weight = random_circulant(rng, (240, 180), block).dense().astype(np.float32)
    weight += 1e-6 * np.abs(weight).max() * rng.standard_normal(weight.shape).astype(np.float32)
    found = BlockCirculant.detect(weight)
    assert found is not None and found.block == block
    assert found.error(weight) <= 1e-5


@few
@given(st.integers(8, 60), st.integers(8, 60), st.data())
def test_detection_finds_a_member_at_least_as_small_as_the_planted_one(out: int, inner: int, data: Any) -> None:
    block = data.draw(st.integers(2, min(out, inner)))
    planted = random_circulant(np.random.default_rng(block), (out, inner), block)
    found = BlockCirculant.detect(planted.dense())
    if planted.num_params < out * inner:
        assert found is not None and found.num_params <= planted.num_params
        np.testing.assert_allclose(found.dense(), planted.dense(), atol=1e-9)


def test_wide_and_tall_slices_of_one_circulant_are_detected() -> None:
    square = circulant(np.random.default_rng(7).standard_normal(84))
    for weight in (square[:10], square[:, :10]):
        found = BlockCirculant.detect(weight)
        assert found is not None and found.block == 84
        np.testing.assert_allclose(found.dense(), weight, atol=1e-12)


@pytest.mark.parametrize(("channels", "block"), [(16, 8), (10, 5), (12, 12)])
def test_planted_convolutions_are_detected_along_channels(channels: int, block: int) -> None:
    planted = random_circulant(np.random.default_rng(8), (20, 9 * channels), block, taps=9)
    weight = planted.dense().reshape(20, 3, 3, channels).transpose(0, 3, 1, 2)
    found = BlockCirculant.detect(Conv2d("conv", np.ascontiguousarray(weight)))
    assert found is not None and (found.block, found.taps) == (block, 9)
    np.testing.assert_allclose(found.c, planted.c, atol=1e-12)


def test_a_convolution_circulant_across_its_taps_is_detected_flat() -> None:
    planted = random_circulant(np.random.default_rng(9), (15, 75), 5, taps=1)
    weight = planted.dense().reshape(15, 5, 5, 3).transpose(0, 3, 1, 2)
    found = BlockCirculant.detect(weight)
    assert found is not None and (found.block, found.taps) == (5, 1)


@pytest.mark.parametrize("weight", [np.zeros((24, 36)), np.full((24, 36), 2.5), np.zeros((7, 5), np.float32)])
def test_constant_matrices_are_members_with_one_vector_per_strip(weight: np.ndarray) -> None:
    found = BlockCirculant.detect(weight)
    assert found is not None
    assert found.num_params == max(weight.shape)
    np.testing.assert_allclose(found.dense(), weight)


def test_other_weights_are_not_mine() -> None:
    rng = np.random.default_rng(10)
    single = np.zeros((64, 48))
    single[5, 7] = 1.0
    nearly = random_circulant(rng, (64, 48), 8).dense()
    nearly[63, 47] += 1e-3 * np.linalg.norm(nearly)
    toeplitz = sum(np.diag(np.full(64 - abs(k), rng.standard_normal()), k) for k in range(-63, 64))
    for weight in (rng.standard_normal((64, 48)), single, nearly, toeplitz, rng.standard_normal((1, 9))):
        assert BlockCirculant.detect(weight) is None
    assert BlockCirculant.detect(nearly, tol=2e-3) is not None


def test_grouped_convolutions_are_not_mine() -> None:
    layer = Conv2d("conv", np.ones((8, 4, 3, 3)), groups=2)
    assert BlockCirculant.detect(layer) is None
    assert BlockCirculant.project(layer, 0.5) is None


def test_detection_projects_only_where_the_pattern_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    weight = random_circulant(rng, (1024, 1024), 12).dense().astype(np.float32)
    projected = []
    from_dense = BlockCirculant.from_dense.__func__  # type: ignore[attr-defined]

    def recorded(cls: type[BlockCirculant], layer: Any, **size: int) -> BlockCirculant:
        projected.append(size["block"])
        return from_dense(cls, layer, **size)

    monkeypatch.setattr(BlockCirculant, "from_dense", classmethod(recorded))
    found = BlockCirculant.detect(weight)
    assert found is not None and projected == [12]  # of 1023 possible lengths
    BlockCirculant.detect(rng.standard_normal((1024, 1024)))
    assert projected == [12]
