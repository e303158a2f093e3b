"""A network of LeNet's size with one layer of every kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_structured.nn import StructuredConv2d, StructuredLinear


class StructuredLeNet(nn.Module):
    """(n, 1, 28, 28) -> (n, 10) logits.

    conv1 5 x 5 plain, conv2 3 x 3 block-circulant per tap, conv3 3 x 3 plain (a candidate for Winograd),
    fc1 block-circulant, fc2 permuted-diagonal, fc3 tensor-train, fc4 plain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = StructuredConv2d(16, 32, 3, "block_circulant", padding=1, block=4)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.fc1 = StructuredLinear(32 * 7 * 7, 512, "block_circulant", block=8)
        self.fc2 = StructuredLinear(512, 256, "permuted_diagonal", block=8)
        self.fc3 = StructuredLinear(256, 64, "tensor_train", out_modes=(4, 4, 4), in_modes=(4, 8, 8), rank=3)
        self.fc4 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (n, 16, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (n, 32, 7, 7)
        x = F.relu(self.conv3(x))
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        return self.fc4(x)


def make_network(seed: int = 0) -> StructuredLeNet:
    """A network whose initial weights come from the seed; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StructuredLeNet()
