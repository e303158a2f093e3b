"""The operators that stand for structured layers in exported torch programs.

    tvm_structured::structured_linear(x, factors, bias, structure, sizes) -> y
    tvm_structured::structured_conv2d(x, factors, bias, structure, sizes, kernel, stride, padding, dilation) -> y

Eager training runs the structure's own `apply`, which autograd sees through. torch.export and torch.compile meet
these operators: one node per layer, its factors as named parameters, so that the importer finds the structure
written down instead of having to recognise it. They are implemented in plain torch and have a gradient, so that
exported and compiled programs also run and train without this package's compiler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Structure

NAMESPACE = "tvm_structured"


@lru_cache(maxsize=1024)
def _read_sizes(sizes: str) -> dict[str, Any]:
    return json.loads(sizes)  # type: ignore[no-any-return]


def member_of(structure: str, sizes: str, factors: Sequence[Any]) -> Structure:
    """The member of the family `structure` that holds these factors; `sizes` is the JSON of its static fields."""
    return STRUCTURES[structure].from_factors(_read_sizes(sizes), factors)


def apply_linear(member: Structure, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out). An empty batch takes the gradient path of one row, of which nothing is kept."""
    out, inner = member.shape
    if x.shape[-1] != inner:
        raise ModelError(f"a {member.name} layer of {inner} features got an input of shape {tuple(x.shape)}")
    rows = x.reshape(-1, inner) if x.numel() else x.new_zeros(1, inner)
    y = member.apply(rows)[: rows.shape[0] if x.numel() else 0].reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias


def apply_conv2d(
    member: Structure,
    x: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x (n, in, h, w) -> (n, out, oh, ow); `padding` is (top, left, bottom, right).

    The dense weight is formed first and handed to torch's convolution: an image has many more patches than a
    patch has values, so forming it costs little and spares the kh * kw times larger patch matrix.
    """
    top, left, bottom, right = padding
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    weight = conv_weight(member, kernel)
    return F.conv2d(x, weight.to(x.dtype), bias, tuple(stride), (top, left), tuple(dilation))


def conv_weight(member: Structure, kernel: Sequence[int]) -> Tensor:
    """The (out, in, kh, kw) weight of a member whose matrix is (out, kh * kw * in), channel fastest."""
    kh, kw = kernel
    by_taps = member.dense().reshape(member.shape[0], kh, kw, -1)
    return by_taps.permute(0, 3, 1, 2).contiguous()  # else torch takes it for channels_last, and so would be the output


@torch.library.custom_op(f"{NAMESPACE}::structured_linear", mutates_args=())
def structured_linear(x: Tensor, factors: list[Tensor], bias: Tensor | None, structure: str, sizes: str) -> Tensor:
    """A dense layer whose weight is a structure: x (..., in) -> (..., out)."""
    return apply_linear(member_of(structure, sizes, factors), x, bias).contiguous()


@torch.library.custom_op(f"{NAMESPACE}::structured_conv2d", mutates_args=())
def structured_conv2d(
    x: Tensor,
    factors: list[Tensor],
    bias: Tensor | None,
    structure: str,
    sizes: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """A convolution whose matrix (out, kh * kw * in) is a structure: x (n, in, h, w) -> (n, out, oh, ow)."""
    y = apply_conv2d(member_of(structure, sizes, factors), x, bias, kernel, stride, padding, dilation)
    return y.contiguous()


@structured_linear.register_fake
def _linear_like(x: Tensor, factors: list[Tensor], bias: Tensor | None, structure: str, sizes: str) -> Tensor:
    out, inner = _read_sizes(sizes)["shape"]
    torch._check(x.shape[-1] == inner, lambda: f"a layer of {inner} features got an input of shape {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], out))


@structured_conv2d.register_fake
def _conv2d_like(
    x: Tensor,
    factors: list[Tensor],
    bias: Tensor | None,
    structure: str,
    sizes: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    out, _ = _read_sizes(sizes)["shape"]
    top, left, bottom, right = padding
    height = (x.shape[2] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (x.shape[3] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return x.new_empty((x.shape[0], out, height, width))


@torch.library.custom_op(f"{NAMESPACE}::structured_gradient", mutates_args=())
def structured_gradient(
    grad: Tensor,
    x: Tensor,
    factors: list[Tensor],
    bias: Tensor | None,
    structure: str,
    sizes: str,
    geometry: list[int],
) -> list[Tensor]:
    """Gradients of x, of the floating-point factors and of the bias, by running the layer again.

    `geometry` is kernel, stride, padding and dilation of a convolution in one list, empty for a dense layer.
    This is an operator of its own since compilers trace gradients with fake tensors and `apply` may read indices.
    """
    inputs = _all_tensors(x, factors, bias)
    trained = [number for number, tensor in enumerate(inputs) if tensor.is_floating_point()]
    indices = {1 + i: factor for i, factor in enumerate(factors) if not factor.is_floating_point()}

    def layer(*values: Tensor) -> Tensor:
        now = {**indices, **dict(zip(trained, values, strict=True))}
        member = member_of(structure, sizes, [now[1 + i] for i in range(len(factors))])
        last = None if bias is None else values[-1]
        if not geometry:
            return apply_linear(member, values[0], last)
        return apply_conv2d(member, values[0], last, geometry[:2], geometry[2:4], geometry[4:8], geometry[8:])

    # inside an operator torch has switched autograd off; torch.func works there as everywhere
    _, pull_back = torch.func.vjp(layer, *(inputs[number] for number in trained))
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in pull_back(grad)]


@structured_gradient.register_fake
def _gradient_like(
    grad: Tensor,
    x: Tensor,
    factors: list[Tensor],
    bias: Tensor | None,
    structure: str,
    sizes: str,
    geometry: list[int],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _all_tensors(x, factors, bias) if t.is_floating_point()]


def _all_tensors(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    return [x, *factors] if bias is None else [x, *factors, bias]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, bias, ctx.structure, ctx.sizes, *ctx.geometry = inputs
    ctx.num_factors = len(factors)
    ctx.save_for_backward(*_all_tensors(x, factors, bias))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    factors, bias = rest[: ctx.num_factors], rest[ctx.num_factors :]
    geometry = [extent for extents in ctx.geometry for extent in extents]
    found = iter(structured_gradient(grad, x, factors, *(bias or [None]), ctx.structure, ctx.sizes, geometry))
    x_grad = next(found)
    factor_grads = [next(found) if factor.is_floating_point() else None for factor in factors]
    return (x_grad, factor_grads, next(found, None), None, None, *(None for _ in ctx.geometry))


structured_linear.register_autograd(_backward, setup_context=_save_inputs)
structured_conv2d.register_autograd(_backward, setup_context=_save_inputs)
