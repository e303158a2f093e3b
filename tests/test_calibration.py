"""Ranges from samples: the observers, and the forms in which people hold their data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tvm_structured.calibration import Observer, Quantization, batches_of
from tvm_structured.inputs import Input

RNG = np.random.default_rng(0)


def observed(*parts: np.ndarray) -> Observer:
    observer = Observer()
    for part in parts:
        observer.add("x", part)
    return observer


def test_minmax_is_the_largest_magnitude() -> None:
    parts = [np.array([0.0, 0.5]), np.array([-3.0]), np.array([2.0])]
    assert observed(*parts).range(Quantization("minmax")) == 3.0


@pytest.mark.parametrize("scale", (1e-6, 1.0, 1e6))
def test_a_percentile_is_that_of_all_values(scale: float) -> None:
    parts = [scale * RNG.standard_normal(5000) * factor for factor in (0.01, 1, 0.3, 4)]
    expected = np.percentile(np.abs(np.concatenate(parts)), 99)
    found = observed(*parts).range(Quantization("percentile", percentile=99))
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_mse_is_no_worse_than_other_ranges() -> None:
    """Values with a few that are far out."""
    values = np.concatenate([RNG.standard_normal(20000), [40.0]])
    chosen = observed(values).range(Quantization("mse"))

    def error(largest: float) -> float:
        step = largest / 127
        return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean())

    assert chosen < 40
    assert error(chosen) <= 1.02 * min(error(largest) for largest in np.linspace(5, 40, 60))


def test_zeros_have_no_range() -> None:
    for method in ("minmax", "percentile", "mse"):
        assert observed(np.zeros(5)).range(Quantization(method)) == 0


X = torch.arange(14, dtype=torch.float32).reshape(7, 2)
ONE = (Input("x", (3, 2), "float32"),)
TWO = (*ONE, Input("y", (3, 1), "float32"))


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.numpy(),
        (X,),
        {"x": X},
        [X[:3], X[3:6], torch.cat([X[6:], X[6:], X[6:]])],
        DataLoader(TensorDataset(X, torch.zeros(7, dtype=torch.int64)), batch_size=3),
        (batch for batch in X.split(3)),
    ],
    ids=("torch", "numpy", "tuple", "dict", "list", "loader", "generator"),
)
def test_data_come_in_many_forms(data: Any) -> None:
    batches = list(batches_of(data, ONE))
    assert all(len(batch) == 1 and batch[0].shape == (3, 2) for batch in batches)
    seen = {tuple(row) for (batch,) in batches for row in batch}
    assert seen == {tuple(row) for row in X.numpy()}


def test_several_inputs_are_cut_alike() -> None:
    batches = list(batches_of((X, X[:, :1]), TWO))
    assert len(batches) == 3
    for x, y in batches:
        np.testing.assert_array_equal(x[:, :1], y)
