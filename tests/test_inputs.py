"""What a caller passes is checked before TVM sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tvm_structured.errors import ModelError
from tvm_structured.inputs import Input, check_inputs

SPECS = (Input("x", (None, 3), "float32"), Input("ids", (2,), "int64"))


def test_inputs_by_position_and_by_name_are_the_same() -> None:
    x, ids = np.zeros((5, 3), np.float32), np.zeros(2, np.int64)
    for found in (check_inputs(SPECS, (x, ids), {}), check_inputs(SPECS, (), {"ids": ids, "x": x})):
        assert found[0] is x and found[1] is ids


def test_numbers_and_lists_take_the_dtype_of_the_model() -> None:
    found = check_inputs(SPECS, ([[1, 2, 3]], [0, 1]), {})
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((5, 4), np.float32), r"x: got shape \(5, 4\), the model takes x: float32\[\?, 3\]"),
        (np.zeros(3, np.float32), r"x: got shape \(3,\)"),
        (np.zeros((5, 3)), "x: got float64, the model takes float32"),
        (torch.zeros(5, 3, dtype=torch.float16), "x: got float16"),
        (np.zeros((5, 3), np.int8), "x: got int8"),
        (np.zeros((5, 3), bool), "x: got bool"),
        (np.zeros((0, 3), np.float32), r"x: shape \(0, 3\) is empty"),
    ],
)
def test_an_input_that_does_not_fit_is_named_with_its_value(x: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_inputs(SPECS, (x, np.zeros(2, np.int64)), {})


def test_missing_extra_and_unknown_inputs_are_refused() -> None:
    x = np.zeros((5, 3), np.float32)
    with pytest.raises(ModelError, match=r"takes 2 inputs .* got 1"):
        check_inputs(SPECS, (x,), {})
    with pytest.raises(ModelError, match="got 3"):
        check_inputs(SPECS, (x, x, x), {})
    with pytest.raises(ModelError, match="unknown input 'y'"):
        check_inputs(SPECS, (x,), {"y": x})
    with pytest.raises(ModelError, match="takes 2 inputs"):
        check_inputs(SPECS, (x,), {"x": x})
