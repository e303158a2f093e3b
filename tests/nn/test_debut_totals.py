"""Parameter totals of the DeBut paper, from modules whose layers are replaced by its chains."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tvm_structured.nn import StructuredConv2d, StructuredLinear
from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.debut_chain import Chain, chain_of, is_bulging

LENET = {
    "conv2": chain_of((4, 2, 1, 2), (3, 2, 2, 6)),
    "fc1": chain_of((16, 2, 1, 2, 2), (25, 2, 2, 2, 2)),
    "fc2": chain_of((2,) * 6, (4, 2, 2, 2, 2, 2)),
}
CONV8 = chain_of((8, 2, 2, 2, 2, 2, 2), (9, 2, 2, 2, 4, 4, 2))
CONV13 = chain_of((8, 2, 2, 2, 2, 2, 2), (9, 2, 2, 2, 4, 4, 4))
EXPAND = chain_of((4, *(2,) * 5, 4, 2, 2), (2,) * 9)  # 512 -> 2048, in both models
RESNET_BULGING = {
    (512, 1024): chain_of((4, 2, 2, 2, 2, 2, 2, 2), (2, 2, 2, 4, 2, 2, 4, 2)),
    (512, 2048): chain_of((4, 4, 4, 4, 2), (1, 4, 4, 16, 8)),
    (512, 4608): chain_of((16, 2, 2, 2, 2, 2), (9, 2, 4, 4, 4, 4)),
    (2048, 512): EXPAND,
}
RESNET_MONOTONIC = {
    (512, 1024): chain_of((4, 4, 4, 4, 2), (4, 4, 4, 4, 4)),
    (512, 2048): chain_of((4, 4, 2, 4, 2, 2), (4, 4, 4, 4, 4, 2)),
    (512, 4608): CONV13,
    (2048, 512): EXPAND,
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def structured(layer: Any, chain: Chain) -> nn.Module:
    """The trainable layer of that chain in the place of a dense one. It has a bias, as the layers of the paper."""
    out = layer.weight.shape[0]
    shape = (out, layer.weight.numel() // out)
    member = DeBut(shape, chain, tuple(np.zeros((f.blocks, f.r, f.s, f.t), np.float32) for f in chain))
    if isinstance(layer, nn.Linear):
        return StructuredLinear.from_structure(member, np.zeros(out, np.float32))
    geometry = {"stride": layer.stride, "padding": layer.padding}
    return StructuredConv2d.from_structure(member, layer.kernel_size, np.zeros(out, np.float32), **geometry)


class LeNet(nn.Module):
    """The paper's modified LeNet: two 3 x 3 convolutions, three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 128), nn.Linear(128, 64), nn.Linear(64, 10)


def vgg16_bn() -> nn.Sequential:
    """VGG-16 with batch normalisation for 32 x 32 images and ten classes."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def test_lenet() -> None:
    model = LeNet()
    assert count(model) == 61_482
    for name, chain in LENET.items():
        setattr(model, name, structured(getattr(model, name), chain))
    assert count(model) == 10_186


def test_vgg16() -> None:
    model = vgg16_bn()
    assert round(count(model) / 1e6, 2) == 14.99
    convolutions = [i for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d)]
    for i in convolutions[7:]:
        model[i] = structured(model[i], CONV8 if model[i].in_channels == 256 else CONV13)
    assert round(count(model) / 1e6, 2) == 2.43


@pytest.mark.parametrize(("chains", "total"), [(RESNET_BULGING, 13.40), (RESNET_MONOTONIC, 13.10)])
def test_resnet50(monkeypatch: pytest.MonkeyPatch, chains: dict[tuple[int, int], Chain], total: float) -> None:
    """All convolutions of the last stage but the one on the shortcut."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    from networks import Residual, bottleneck, resnet

    model = resnet(bottleneck, 4, (3, 4, 6, 3))
    assert 25.55 <= count(model) / 1e6 < 25.56
    for block in [layer for layer in model if isinstance(layer, Residual)][-3:]:
        for i, layer in enumerate(block.branch):
            if isinstance(layer, nn.Conv2d):
                shape = (layer.out_channels, math.prod(layer.weight.shape[1:]))
                block.branch[i] = structured(layer, chains[shape])
    assert round(count(model) / 1e6, 2) == total


def test_the_bulging_model_has_bulging_chains() -> None:
    assert sum(is_bulging(chain) for chain in RESNET_BULGING.values()) == 3
    assert not any(is_bulging(chain) for chain in RESNET_MONOTONIC.values())
