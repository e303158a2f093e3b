"""Models that the tests of the Relay user's door share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tvm_structured as ts


class Mlp(torch.nn.Module):
    """Odd sizes; the weight of `fc1` has rank 3 and is large enough for that to pay, that of `fc2` has no structure."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = torch.nn.Linear(257, 131), torch.nn.LayerNorm(131), torch.nn.Linear(131, 5)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.randn(131, 3) @ torch.randn(3, 257) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.fc2(self.norm(torch.relu(self.fc1(x)))), -1)


class TwoHeads(torch.nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(4, 3), torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.left(x) - self.right(y)
        return hidden, torch.sigmoid(hidden)


class ConvNet(torch.nn.Module):
    """Convolution, batch norm with statistics, pooling, a flatten that reads the shape, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 7, 3, padding=1), torch.nn.BatchNorm2d(7)
        self.drop, self.fc = torch.nn.Dropout(0.5), torch.nn.Linear(7 * 16, 10)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-0.5, 0.5)
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.bn(self.conv(x))), 2)
        return self.fc(self.drop(x.view(x.shape[0], -1)))


def seeded(family: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return family(*args).eval()


@pytest.fixture(autouse=True, scope="module")
def no_measurements() -> Iterator[None]:
    """Costs are predicted unless a test asks otherwise: quicker, and the same choices on every machine."""
    with ts.options(measure=False):
        yield


@pytest.fixture(scope="session")
def mlp() -> Any:
    return seeded(Mlp)


@pytest.fixture(scope="session")
def two_heads() -> Any:
    return seeded(TwoHeads)


@pytest.fixture(scope="session")
def conv_net() -> Any:
    return seeded(ConvNet)


@pytest.fixture(scope="session")
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def onnx_mlp() -> Any:
    """Gemm(transB) -> Relu -> MatMul -> Add; the batch is left open, names have dots and a digit in front."""
    rng = np.random.default_rng(3)
    weights = {
        "1.weight": rng.standard_normal((11, 19)).astype(np.float32),
        "1.bias": rng.standard_normal(11).astype(np.float32),
        "head.W": rng.standard_normal((11, 6)).astype(np.float32),
        "head.b": rng.standard_normal(6).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["data.0", "1.weight", "1.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "head.W"], ["m"]),
        helper.make_node("Add", ["m", "head.b"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("data.0", TensorProto.FLOAT, ["N", 19])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 6])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model
