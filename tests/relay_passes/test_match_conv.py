"""Spellings of convolution that torch and ONNX exporters use, against torch and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_harness import (
    CLOSE,
    canonical,
    check_torch,
    node,
    only_call,
    onnx_model,
    onnx_runtime,
    operators,
    run,
    weight,
)
from torch import nn
from torch.nn import functional as F

from tvm_structured import dialect

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
dialect.register()


B6 = weight(RNG, 6)
CONV = {"w": weight(RNG, 4, 3, 3, 3), "b": weight(RNG, 4)}
ONNX_CONV: dict[str, tuple[Any, ...]] = {
    # id: (nodes, weights, x shape, y shape, kernel, stride, padding, groups)
    "plain": (
        [node("Conv", "x w", "y")], {"w": CONV["w"]}, (2, 3, 9, 8), (2, 4, 7, 6), (3, 3), (1, 1), (0, 0, 0, 0), 1,
    ),
    "bias_asymmetric_dilated": (
        [node("Conv", "x w b", "y", pads=[1, 0, 0, 2], dilations=[2, 1])],
        CONV, (1, 3, 9, 8), (1, 4, 6, 8), (3, 3), (1, 1), (1, 0, 0, 2), 1,
    ),
    "same_upper": (
        [node("Conv", "x w b", "y", auto_pad="SAME_UPPER", strides=[2, 2])],
        CONV, ("N", 3, 8, 9), ("N", 4, 4, 5), (3, 3), (2, 2), (0, 1, 1, 1), 1,
    ),
    "same_lower": (
        [node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 1])],
        {"w": CONV["w"]}, (2, 3, 8, 9), (2, 4, 4, 9), (3, 3), (2, 1), (1, 1, 0, 1), 1,
    ),
    "explicit_pad": (
        [node("Pad", "x p", "h"), node("Conv", "h w", "y", pads=[0, 1, 0, 0])],
        {"w": CONV["w"], "p": np.array([0, 0, 1, 2, 0, 0, 0, 1])},
        (1, 3, 9, 8), (1, 4, 8, 10), (3, 3), (1, 1), (1, 3, 0, 1), 1,
    ),
    "one_by_one": (
        [node("Conv", "x w b", "y")],
        {"w": weight(RNG, 7, 3, 1, 1), "b": weight(RNG, 7)},
        (2, 3, 5, 6), (2, 7, 5, 6), (1, 1), (1, 1), (0, 0, 0, 0), 1,
    ),
    "grouped": (
        [node("Conv", "x w b", "y", group=3, pads=[1, 1, 1, 1])],
        {"w": weight(RNG, 6, 2, 3, 3), "b": B6}, (2, 6, 5, 7), (2, 6, 5, 7), (3, 3), (1, 1), (1, 1, 1, 1), 3,
    ),
    "depthwise": (
        [node("Conv", "x w", "y", group=6, strides=[1, 2])],
        {"w": weight(RNG, 6, 1, 2, 3)}, (1, 6, 5, 7), (1, 6, 4, 3), (2, 3), (1, 2), (0, 0, 0, 0), 6,
    ),
    "one_dimensional": (
        [node("Conv", "x w b", "y", pads=[1, 2], strides=[2], dilations=[2])],
        {"w": weight(RNG, 6, 3, 3), "b": B6}, (2, 3, 9), (2, 6, 4), (1, 3), (1, 2), (0, 1, 0, 2), 1,
    ),
    "one_dimensional_same": (
        [node("Conv", "x w", "y", auto_pad="SAME_LOWER", group=3)],
        {"w": weight(RNG, 6, 1, 4)}, (1, 3, 9), (1, 6, 9), (1, 4), (1, 1), (0, 2, 0, 1), 3,
    ),
    "scaled_weight": (
        [node("Mul", "w g", "v"), node("Conv", "x v", "y")],
        {"w": CONV["w"], "g": weight(RNG, 4, 1, 1, 1)}, (1, 3, 4, 4), (1, 4, 2, 2), (3, 3), (1, 1), (0, 0, 0, 0), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONNX_CONV)
def test_onnx_spellings_of_convolution(case: str) -> None:
    nodes, weights, x_shape, y_shape, kernel, stride, padding, groups = ONNX_CONV[case]
    model = onnx_model(nodes, weights, x_shape, y_shape)
    mod = canonical(model)
    call = only_call(mod)
    assert (call.op, call.layer) == ("conv2d", "w")
    assert call.conv is not None
    assert (call.conv.kernel, call.conv.stride, call.conv.padding, call.conv.groups) == (
        kernel,
        stride,
        padding,
        groups,
    )
    x = weight(RNG, *(2 if extent == "N" else extent for extent in x_shape))
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 3, padding=2, groups=2, dilation=2)
        self.c2 = nn.Conv2d(8, 8, (3, 2), padding="same", groups=8)
        self.c3 = nn.Conv2d(8, 12, 1, stride=(1, 2), bias=False)
        self.c4 = nn.Conv2d(12, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c4(F.pad(self.c3(self.c2(self.c1(x).reshape(-1, 8, 5, 2))), (1, 1, 0, 2)))


def test_torch_spellings_of_convolution() -> None:
    torch.manual_seed(0)
    mod = check_torch(Convolutions(), torch.randn(3, 4, 10), names=[f"c{i}.weight" for i in (1, 2, 3, 4)])
    assert "relax.nn.pad" not in operators(mod)
