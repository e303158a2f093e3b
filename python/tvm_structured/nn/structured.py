"""Trainable layers with a structured weight: one module for all of STRUCTURES.

    StructuredLinear(512, 256, structure="block_circulant", block=8)
    StructuredConv2d(16, 32, 3, padding=1, structure="block_circulant", block=4)

The factors of the structure are the parameters ("fc1.c", "fc1.core0", ...), its index factors are buffers.
`to_structure()` hands the trained member to the compiler as it is; nothing has to be recognised again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.nn.members import (
    Padding,
    Pair,
    conv_layer,
    describe_geometry,
    draw_member,
    pair,
    to_numpy,
    weightless,
)
from tvm_structured.nn.ops import (
    apply_conv2d,
    apply_linear,
    conv_weight,
    structured_conv2d,
    structured_linear,
)
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Structure

LARGEST_FORMED = 1 << 22  # numbers of a weight whose norm is computed; that of a larger one is estimated
PROBES = 256  # random inputs for that


class Structured(nn.Module):
    """A layer that holds a member of STRUCTURES. The base of `StructuredLinear` and `StructuredConv2d`."""

    structure: str
    sizes: str  # JSON of the member's static fields: with the factors it rebuilds the member

    def __init__(self, member: Structure, bias: bool, **factory: Any) -> None:
        super().__init__()
        if member.name not in STRUCTURES:
            raise ModelError(f"{member.name!r} is not in STRUCTURES ({', '.join(STRUCTURES)}); add the structure there")
        self.structure = member.name
        self.sizes = json.dumps(member.sizes_of)
        self.static = dict(member.sizes_of)
        self.factor_names = tuple(member.factors)
        self.trainable_names = tuple(member.trainable_factors)
        self.detail = member.describe()
        for name, array in member.factors.items():
            self._add_factor(name, array, factory)
        if bias:
            self.bias = nn.Parameter(torch.zeros(member.shape[0], **factory))
        else:
            self.register_parameter("bias", None)

    def _add_factor(self, name: str, array: Any, factory: Mapping[str, Any]) -> None:
        tensor = torch.tensor(np.asarray(array), device=factory.get("device"))
        if name in self.trainable_names:
            self.register_parameter(name, nn.Parameter(tensor.to(factory.get("dtype") or tensor.dtype)))
        else:
            self.register_buffer(name, tensor)

    @property
    def factors(self) -> list[Tensor]:
        """The factor tensors, in the order in which kernels take them."""
        return [getattr(self, name) for name in self.factor_names]

    def member(self) -> Structure:
        """The structure holding this module's own tensors: gradients flow through its `apply`."""
        return STRUCTURES[self.structure].from_factors(self.static, self.factors)

    def to_structure(self) -> Structure:
        """The numpy member, with copies of the factors: exact, nothing is detected or projected."""
        arrays = [to_numpy(tensor) for tensor in self.factors]
        return STRUCTURES[self.structure].from_factors(self.static, arrays)

    def dense_weight(self) -> Tensor:
        """The dense weight in torch's layout; gradients flow."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the trainable factors anew. The weight's entries get the mean square of torch's own layers, 1 / (3 in).

        A weight is homogeneous in its k trainable factors, of degree k. So they are drawn from N(0, 1) and all
        scaled by (wanted / drawn Frobenius norm)^(1/k), which leaves them balanced. The bias is uniform within
        1 / sqrt(in), as in torch. For a convolution `in` counts the taps: kh * kw * channels.
        """
        trainable = [getattr(self, name) for name in self.trainable_names]
        if any(tensor.is_meta for tensor in trainable):  # to be drawn once the module has memory
            return
        for tensor in trainable:
            tensor.normal_()
        out, inner = self.static["shape"]
        norm = self.frobenius_norm()
        if norm > 0:
            scale = (math.sqrt(out / 3) / norm) ** (1 / len(trainable))
            for tensor in trainable:
                tensor.mul_(scale)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(inner), 1 / math.sqrt(inner))

    def frobenius_norm(self) -> float:
        """Of the weight; of one too large to be formed within a few per cent, from random inputs: E ||W g||^2."""
        wide = [f.float() if f.is_floating_point() else f for f in self.factors]
        member = STRUCTURES[self.structure].from_factors(self.static, wide)
        out, inner = self.static["shape"]
        if out * inner <= LARGEST_FORMED or Dense not in member.accepts:
            return float(member.dense().double().norm())
        probes = torch.randn(PROBES, inner, device=wide[0].device)
        return float(member.apply(probes).double().norm()) / math.sqrt(PROBES)


class StructuredLinear(Structured):
    """y = x W^T + b with a structured W (out, in); x is (..., in).

    `size` is what the structure's `from_dense` takes, for example block=8. Raises ModelError for a size the
    structure does not have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: str,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **size: Any,
    ) -> None:
        layer = Dense("weight", weightless(out_features, in_features))
        super().__init__(draw_member(structure, layer, size), bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.reset_parameters()

    @classmethod
    def from_structure(cls, member: Structure, bias: Any = None) -> Self:
        """A layer that starts from a given member, whose factors it copies."""
        self = cls.__new__(cls)
        Structured.__init__(self, member, bias is not None)
        self.out_features, self.in_features = member.shape
        return with_bias(self, bias)

    @property
    def weight(self) -> Tensor:
        """The dense (out, in) weight, for code that reads `layer.weight`; gradients flow."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        return self.member().dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return structured_linear(x, self.factors, self.bias, self.structure, self.sizes)
        return apply_linear(self.member(), x, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, structure={self.structure}, {self.detail}, bias={bias}"


class StructuredConv2d(Structured):
    """2-D convolution whose (out, kh * kw * in) matrix, channel fastest, is structured; x is (n, in, h, w).

    Arguments are those of torch.nn.Conv2d, without groups and with zero padding only. `padding` may also be
    (top, left, bottom, right), which is what the attribute holds.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        structure: str,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **size: Any,
    ) -> None:
        weight = weightless(out_channels, in_channels, *pair(kernel_size))
        layer = conv_layer(weight, stride, padding, dilation)
        super().__init__(draw_member(structure, layer, size), bias, device=device, dtype=dtype)
        self._place(layer)
        self.reset_parameters()

    @classmethod
    def from_structure(
        cls,
        member: Structure,
        kernel_size: Pair,
        bias: Any = None,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
    ) -> Self:
        """A layer that starts from a given member of shape (out, kh * kw * in), whose factors it copies."""
        kernel = pair(kernel_size)
        channels, rest = divmod(member.shape[1], math.prod(kernel))
        if rest:
            raise ModelError(f"{member.name} of shape {member.shape} does not fit a kernel of {kernel}")
        shape = (member.shape[0], channels, *kernel)
        layer = conv_layer(weightless(*shape), stride, padding, dilation)
        if not member.takes(layer):
            raise ModelError(f"{member.name} is not defined for {describe_geometry(layer)}")
        self = cls.__new__(cls)
        Structured.__init__(self, member, bias is not None)
        self._place(layer)
        return with_bias(self, bias)

    def _place(self, layer: Conv2d) -> None:
        self.out_channels, self.in_channels = (int(extent) for extent in layer.weight.shape[:2])
        self.kernel_size, self.stride = layer.kernel, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def dense_weight(self) -> Tensor:
        """(out, in, kh, kw)."""
        return conv_weight(self.member(), self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:  # one image, as torch.nn.Conv2d takes it
            return self.forward(x.unsqueeze(0)).squeeze(0)
        geometry = [list(v) for v in (self.kernel_size, self.stride, self.padding, self.dilation)]
        if torch.compiler.is_compiling():
            return structured_conv2d(x, self.factors, self.bias, self.structure, self.sizes, *geometry)
        return apply_conv2d(self.member(), x, self.bias, *geometry)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, structure={self.structure}, {self.detail}, bias={self.bias is not None}"
        )


def with_bias(module: Any, bias: Any) -> Any:
    """The module with its bias set to a copy of the given values (or without one)."""
    if bias is not None:
        like = getattr(module, module.trainable_names[0])
        module.bias = nn.Parameter(torch.as_tensor(bias).detach().to(like.device, like.dtype).clone())
    return module
