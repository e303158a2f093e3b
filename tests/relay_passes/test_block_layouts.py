"""Images stay in blocks of channels between convolutions, and the numbers stay the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from tvm import relax

import tvm_structured as ts
from tvm_structured.structures import STRUCTURES, Conv2d

RNG = np.random.default_rng(0)


def compiled(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    """Compiled for this machine; checked against torch."""
    model = model.eval()
    made = ts.compile(model, inputs=(x,), target="host", **{"measure": False, **options})
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(made(x.numpy()), expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    return made


def conversions(made: Any) -> Counter[str]:
    """How often images are converted."""
    text = made.mod.script()
    return Counter(re.findall(r"call_tir\(cls\.(to_blocks|from_blocks)", text[text.index("def main") :]))


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups)


class Residual(nn.Module):
    """Stem, pool, residual and downsampling blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.a, self.b = conv(32, 32), conv(32, 32)
        self.c, self.down = conv(32, 64, 3, 2), conv(32, 64, 1, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = functional.relu(x + self.b(functional.relu(self.a(x))))
        x = functional.relu(self.c(x) + self.down(x))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def test_a_residual_network_is_converted_once_at_its_end() -> None:
    assert conversions(compiled(Residual(), torch.randn(2, 3, 65, 67))) == {"from_blocks": 1}


def test_a_single_convolution_is_not_converted() -> None:
    assert not conversions(compiled(nn.Sequential(conv(32, 32), nn.ReLU()), torch.randn(1, 32, 9, 9)))


def test_a_vgg_block_is_converted_at_its_edges() -> None:
    model = nn.Sequential(
        conv(16, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), nn.MaxPool2d(2), conv(32, 48), nn.AvgPool2d(3, 2, 1)
    )
    assert conversions(compiled(model, torch.randn(1, 16, 18, 21))) == {"to_blocks": 1, "from_blocks": 1}


class Inception(nn.Module):
    """Branches of several widths, concatenated; squeeze and excitation; activations that no epilogue takes."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv(32, width, kernel) for width, kernel in zip(widths, (1, 3, 5), strict=True))
        self.squeeze, self.excite = conv(sum(widths), 16, 1), conv(16, sum(widths), 1)
        self.last = conv(sum(widths), 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([functional.silu(branch(x)) for branch in self.branches], 1)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(functional.leaky_relu(x * gate) * 0.5 + 1.0)


@pytest.mark.parametrize(("widths", "most"), [((16, 32, 48), 2), ((32, 32, 24), 2), ((24, 32, 40), 8)], ids=str)
def test_branches_are_joined_in_blocks_where_they_fill_them(widths: tuple[int, ...], most: int) -> None:
    counted = conversions(compiled(Inception(widths), torch.randn(2, 32, 11, 13)))
    assert sum(counted.values()) <= most


def test_depthwise_and_grouped_convolutions_join_in() -> None:
    model = nn.Sequential(
        conv(24, 48, 1), nn.ReLU6(), conv(48, 48, 3, 2, groups=48), nn.ReLU6(), conv(48, 24, 1), conv(24, 32, 3, 1, 2)
    )
    counted = conversions(compiled(model, torch.randn(2, 24, 15, 17)))
    assert counted == {"to_blocks": 1, "from_blocks": 1}


def test_few_channels_stay_as_they_are() -> None:
    assert not conversions(compiled(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 10)), torch.randn(1, 3, 20, 20)))


def test_one_module_serves_every_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    model = Residual().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 33, 33),), dynamic_shapes=({0: batch},))
    made = ts.compile(program, target="host", measure=False)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 33, 33)
        with torch.no_grad():
            np.testing.assert_allclose(made(x.numpy()), model(x).numpy(), rtol=2e-4, atol=2e-4)


SIZES = {"block_circulant": {"block": 8}, "permuted_diagonal": {"block": 8}, "low_rank": {"rank": 5}}


@pytest.mark.parametrize("family", SIZES)
def test_matrix_structures_read_and_write_blocks(family: str) -> None:
    model = nn.Sequential(conv(32, 48), nn.ReLU(), conv(48, 40, 3, 2), nn.ReLU(), conv(40, 32, 1))
    layer = Conv2d("w", model[2].weight.detach().numpy(), (2, 2), (1, 1, 1, 1))
    member = STRUCTURES[family].from_dense(layer, **SIZES[family])
    matrix = np.asarray(member.dense(), np.float32).reshape(40, 3, 3, 48)
    model[2].weight.data = torch.from_numpy(np.ascontiguousarray(matrix.transpose(0, 3, 1, 2)))
    made = compiled(model, torch.randn(2, 32, 9, 11), plan=ts.Plan({"2.weight": member}))
    assert conversions(made) == {"to_blocks": 1, "from_blocks": 1}


def test_blocks_stay_within_the_dataflow_block_that_made_them() -> None:
    weights = [RNG.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17 for _ in range(3)]
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 32, 9, 9), "float32"))

    def layer(value: Any, weight: np.ndarray) -> Any:
        return relax.op.nn.conv2d(value, relax.const(weight), padding=(1, 1))

    with builder.function("main", [x]):
        with builder.dataflow():
            first = builder.emit_output(layer(builder.emit(layer(x, weights[0])), weights[1]))
        with builder.dataflow():
            second = builder.emit(layer(first, weights[2]))
            result = builder.emit_output(builder.emit(relax.op.add(second, first)))
        builder.emit_func_output(result)
    made = ts.compile(builder.get(), target="host", measure=False)
    image = RNG.standard_normal((1, 32, 9, 9)).astype(np.float32)
    middle = torch.from_numpy(image)
    for weight in weights[:2]:
        middle = functional.conv2d(middle, torch.from_numpy(weight), padding=1)
    expected = functional.conv2d(middle, torch.from_numpy(weights[2]), padding=1) + middle
    np.testing.assert_allclose(made(image), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["llvm", {"kind": "llvm", "mcpu": "haswell"}], ids=str)
def test_blocks_are_as_wide_as_the_targets_vectors(target: Any) -> None:
    model, x = Residual().eval(), torch.randn(1, 3, 40, 40)
    made = ts.compile(model, inputs=(x,), target=target, measure=False)
    with torch.no_grad():
        np.testing.assert_allclose(made(x.numpy()), model(x).numpy(), rtol=2e-4, atol=2e-4)
