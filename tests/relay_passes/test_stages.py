"""Structures as products of stages: the stages in turn are the structure."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_structured.relay_passes.stages import Stage, stages_of
from tvm_structured.structures import STRUCTURES, Dense, Structure, TensorTrain

RNG = np.random.default_rng(0)


def members() -> list[Structure]:
    def layer(out: int, inner: int) -> Dense:
        return Dense("w", RNG.standard_normal((out, inner)).astype(np.float32))

    chains = [size for size in STRUCTURES["debut"].sizes(layer(256, 256))][:3]
    return [
        TensorTrain.from_dense(layer(60, 70), out_modes=(4, 5, 3), in_modes=(5, 2, 7), rank=4),
        TensorTrain.from_dense(layer(6, 70), out_modes=(1, 2, 3), in_modes=(5, 2, 7), rank=3),
        TensorTrain.from_dense(layer(12, 7), out_modes=(12,), in_modes=(7,)),
        *(STRUCTURES["debut"].from_dense(layer(256, 256), **size) for size in chains),
    ]


@pytest.mark.parametrize("structure", members(), ids=lambda member: f"{member.name}-{member.shape}")
def test_stages_in_turn_are_the_structure(structure: Structure) -> None:
    stages = stages_of(structure)
    assert stages is not None
    x = RNG.standard_normal((3, structure.shape[1]))
    state = x
    for stage in stages:
        state = stage.apply(state)
    np.testing.assert_allclose(state, structure.apply(x), rtol=1e-4, atol=1e-4)


def test_a_matrix_without_factors_has_no_stages() -> None:
    weight = RNG.standard_normal((8, 8)).astype(np.float32)
    assert stages_of(STRUCTURES["block_circulant"].from_dense(Dense("w", weight), block=4)) is None


@pytest.mark.parametrize("places", (1, 6))
def test_values_of_rows_are_those_of_features(places: int) -> None:
    """gather undoes spread, and feature (a, i, b) has the value of row i at place (a, b)."""
    stage = Stage("s", np.zeros((places, 4, 5)), 2, 3)
    by_row = RNG.standard_normal((places, 4))
    features = stage.spread(by_row)
    np.testing.assert_array_equal(stage.gather(features), by_row)
    assert features.reshape(2, 4, 3)[1, 2, 0] == by_row[3 if places > 1 else 0, 2]
