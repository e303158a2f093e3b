"""Operators of torch that TVM 0.27's importer gets wrong or does not know, as converters for `from_exported_program`.

Each takes the graph's node and the importer and emits Relax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Converter = Callable[[Any, Any], Any]


def argument(node: Any, index: int, name: str, default: Any) -> Any:
    """By position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def elu(node: Any, importer: Any) -> Any:
    """scale * (x where x > 0, else alpha * (exp(input_scale * x) - 1)): SELU is one with a scale, which TVM drops."""
    from tvm import relax

    x = importer.env[node.args[0]]
    parameters = (("alpha", 1.0), ("scale", 1.0), ("input_scale", 1.0))
    alpha, scale, input_scale = (argument(node, i + 1, *named) for i, named in enumerate(parameters))

    def number(value: float) -> Any:
        return relax.const(value, x.ty.dtype)

    low = relax.op.minimum(x, number(0.0))  # exp of large numbers is infinite
    negative = relax.op.subtract(relax.op.exp(relax.op.multiply(low, number(input_scale))), number(1.0))
    positive = relax.op.nn.relu(x)
    total = relax.op.add(positive, relax.op.multiply(negative, number(alpha)))
    return importer.block_builder.emit(relax.op.multiply(total, number(scale)))


def reduction(operator: str, keyword: str) -> Converter:
    """amax, amin, prod: over the dimensions of the second argument, all without one."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        axes = argument(node, 1, keyword, None)
        axes = [axes] if isinstance(axes, int) else list(axes) if axes else None
        x, keepdims = importer.env[node.args[0]], bool(argument(node, 2, "keepdim", False))
        return importer.block_builder.emit(getattr(relax.op, operator)(x, axes, keepdims))

    return convert


def group_norm(node: Any, importer: Any) -> Any:
    """Also without weight and bias, which TVM's operator insists on."""
    from tvm import relax

    x, channels = importer.env[node.args[0]], int(node.args[4])

    def parameter(index: int, value: float) -> Any:
        given = node.args[index]
        return relax.const(np.full(channels, value), x.ty.dtype) if given is None else importer.env[given]

    normal = relax.op.nn.group_norm(
        x,
        parameter(1, 1.0),
        parameter(2, 0.0),
        num_groups=node.args[6],
        channel_axis=1,
        axes=list(range(2, x.ty.ndim)),
        epsilon=node.args[7],
    )
    return importer.block_builder.emit(normal)


CONVERTERS: dict[str, Converter] = {
    "elu.default": elu,
    "amax.default": reduction("max", "dim"),
    "amin.default": reduction("min", "dim"),
    "prod.dim_int": reduction("prod", "dim"),
    "native_group_norm.default": group_norm,
}
