"""What kernels should compute, in float64."""

from __future__ import annotations

import math

import numpy as np

from tvm_structured.schedules import ConvGeometry, Epilogue
from tvm_structured.structures import Structure


def dense_reference(structure: Structure, x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ np.asarray(structure.dense(), np.float64).T


def conv_reference(structure: Structure, x: np.ndarray, conv: ConvGeometry) -> np.ndarray:
    import torch

    matrix = np.asarray(structure.dense(), np.float64)
    weight = matrix.reshape(matrix.shape[0], *conv.kernel, -1).transpose(0, 3, 1, 2)
    top, left, bottom, right = conv.padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    tensors = torch.from_numpy(padded), torch.from_numpy(np.ascontiguousarray(weight))
    return torch.conv2d(*tensors, stride=conv.stride, dilation=conv.dilation, groups=conv.groups).numpy()


def finish(linear: np.ndarray, epilogue: Epilogue, operands: dict[str, np.ndarray]) -> np.ndarray:
    """act(scale * linear + bias + residual)."""
    from scipy.special import erf, expit

    feature = (1, -1) + (1,) * (linear.ndim - 2)
    y = linear
    if epilogue.scale:
        y = y * operands["scale"].astype(np.float64).reshape(feature)
    if epilogue.bias:
        y = y + operands["bias"].reshape(feature)
    if epilogue.residual:
        y = y + operands["residual"]
    match epilogue.activation:
        case "relu":
            return np.maximum(y, 0)
        case "clip":
            return np.clip(y, epilogue.low, epilogue.high)
        case "gelu":
            return y * 0.5 * (1 + erf(y / math.sqrt(2)))
        case "gelu_tanh":
            return y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        case "silu":
            return y * expit(y)
    return y


def output_image(conv: ConvGeometry | None, image: tuple[int, int]) -> tuple[int, int]:
    if conv is None:
        return (0, 0)
    top, left, bottom, right = conv.padding
    height, width = (
        (extent + around - dilation * (kernel - 1) - 1) // stride + 1
        for extent, around, kernel, stride, dilation in zip(
            image, (top + bottom, left + right), conv.kernel, conv.stride, conv.dilation, strict=True
        )
    )
    return height, width
