"""A layer and the views of its output: reshapes and permutations that an elementwise operation passes through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import LayerCall, matrix_shape, static_shape
from tvm_structured.relay_passes.expressions import is_static, op_name, permutation
from tvm_structured.structures.layer import Array

VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten", "relax.permute_dims")


@dataclass(frozen=True)
class Site:
    """views[-1](... views[0](layer)), each result read once: the layer may absorb what follows.

    `channel_axis` is where the layer's output features lie in the last view, None where a view mixed them.
    """

    layer: LayerCall
    views: tuple[Any, ...]
    output: Any  # the variable that the layer itself is bound to
    channel_axis: int | None

    @property
    def keeps_order(self) -> bool:
        """Whether the last view holds the elements in the order of the layer's output."""
        return all(op_name(view) != "relax.permute_dims" for view in self.views)

    def replay(self, layer: LayerCall, emit: Callable[[Any], Any]) -> Any:
        """The same views of another layer; the last expression is not yet bound."""
        result = layer.to_relax()
        for view in self.views:
            result = relax.Call(view.op, [emit(result), *view.args[1:]], view.attrs, view.ty_args)
        return result

    def per_channel(self, value: Array, rank: int) -> Array | None:
        """A constant that broadcasts along everything but the features, as (out,) in float64; else None."""
        if value.ndim > rank or not (value.dtype.kind == "f" or str(value.dtype) == "bfloat16"):
            return None
        out = matrix_shape(self.layer)[0]
        aligned = value.reshape((1,) * (rank - value.ndim) + value.shape)
        if value.size == 1:
            return np.full(out, float(value.reshape(())))
        if self.channel_axis is None or value.size != out or aligned.shape[self.channel_axis] != out:
            return None
        return aligned.reshape(out).astype(np.float64)


def find_site(var: Any, lookup: Callable[[Any], Any], uses: Callable[[Any], int], reads: int = 1) -> Site | None:
    """The layer behind a variable that is read `reads` times; None without one, or where it has other readers."""
    views: list[Any] = []
    while isinstance(var, relax.Var) and uses(var) == (reads if not views else 1):
        value = lookup(var)
        layer = LayerCall.of(value) if value is not None else None
        if layer is not None:
            return Site(layer, tuple(views), var, last_channel_axis(layer, var, views))
        if isinstance(value, relax.Var):
            var, reads = value, 1
        elif op_name(value) in VIEWS:
            views.insert(0, value)
            var = value.args[0]
        else:
            return None
    return None


def last_channel_axis(layer: LayerCall, var: Any, views: list[Any]) -> int | None:
    axis: int | None = 1 if layer.conv is not None else var.ty.ndim - 1
    for view in views:
        if axis is None:
            return None
        axis = channel_axis_after(view, axis)
    return axis


def channel_axis_after(view: Any, axis: int) -> int | None:
    """Where one axis goes. In a reshape it stays one axis if an axis of its extent has as many elements after it."""
    if op_name(view) == "relax.permute_dims":
        return permutation(view).index(axis)
    before, after = static_shape(view.args[0]), static_shape(view)
    if before is None or after is None or not is_static(before[axis:]):
        return None
    inner = math.prod(before[axis + 1 :])
    for candidate, extent in enumerate(after):
        rest = after[candidate + 1 :]
        if extent == before[axis] and is_static(rest) and math.prod(rest) == inner:
            return candidate
    return None
