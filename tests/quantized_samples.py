"""Random quantized operators, modules of one of them, and networks to quantize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax

from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.pipeline import structured_pipeline
from tvm_structured.targets import resolve_target


def int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape, np.int8)


def inputs_of(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(relax.Var(f"x{i}", relax.TensorType(list(shape), "int8")) for i, shape in enumerate(shapes))


def constants(rng: np.random.Generator, weight: np.ndarray, outs: int, per_channel: bool = True) -> tuple[Any, ...]:
    """Weight, bias and multipliers."""
    bias = rng.integers(-5000, 5000, outs, np.int32)
    multiplier = rng.integers(1, 100, outs if per_channel else 1, np.int32)
    return tuple(relax.const(array) for array in (weight, bias, np.broadcast_to(multiplier, (outs,)).copy()))


def with_residual(call: QuantizedCall, joined: bool = False) -> QuantizedCall:
    """The same call plus a tensor of its output's shape."""
    (x,) = call.inputs
    shapes = [tuple(int(extent) for extent in x.ty.shape), call.output_shape()]
    return replace(call, inputs=inputs_of(*shapes), multipliers=(29,), shifts=(5,), joined=int(joined))


def module_of(call: QuantizedCall) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    with builder.function("main", list(call.inputs), attrs={"num_input": len(call.inputs)}):
        with builder.dataflow():
            result = builder.emit_output(call.to_relax())
        builder.emit_func_output(result)
    return builder.get()


def run_on_cpu(mod: tvm.IRModule, *arrays: np.ndarray) -> np.ndarray:
    target = resolve_target("host")
    with target:
        lowered = structured_pipeline({}, target)(mod)
        executable = tvm.compile(lowered, target, relax_pipeline="default_build")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*arrays).numpy()


class Network(nn.Module):
    """Odd sizes, a residual, pools of every kind, a sum of two branches, groups, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.inner = nn.Conv2d(20, 20, 3, padding=1)
        self.down = nn.Conv2d(20, 33, 3, stride=2, padding=1)
        self.left, self.right = nn.Conv2d(33, 36, 1), nn.Conv2d(33, 36, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(36, 12, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Linear(12, 10)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.max_pool2d(x, 3, 2, 1)
        x = functional.relu(self.inner(x) + x)
        x = functional.relu6(self.down(x))
        x = functional.relu(functional.avg_pool2d(self.left(x), 2) + functional.avg_pool2d(self.right(x), 2))
        x = functional.relu(self.up(x))
        return self.out(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        down = nn.Sequential(nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.down = nn.Identity() if stride == 1 and inner == out else down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.down(x))


def resnet18() -> nn.Module:
    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*stem, *(Block(*stage) for stage in stages), Block(512, 512, 1), *head)
