"""Where a tensor's elements come from: reshapes, permutations, slices, broadcasts and a factor, undone.

A view is `scale * source[offset + sum of index * stride]`; what is no such view of anything else is one of itself.
Extents may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax, sym, tirx

from tvm_structured.dialect import static_shape
from tvm_structured.relay_passes.expressions import integers, op_name, permutation, same_extent
from tvm_structured.schedules.base import Extent

Shape = tuple[Extent, ...]
Digit = tuple[Extent, Extent]  # extent, stride
Axis = tuple[Digit, ...]


@dataclass(frozen=True, eq=False)
class View:
    """Strides and offset count elements of `source`, which is contiguous.

    An axis is a list of digits (extent, stride), the slowest first: a reshape may merge axes that do not follow one
    another in memory, and a later one take them apart again.
    """

    source: Any
    axes: tuple[Axis, ...]
    offset: Extent = 0
    scale: float = 1.0

    @property
    def shape(self) -> Shape:
        return tuple(product(extent for extent, _ in axis) for axis in self.axes)

    @property
    def strides(self) -> Shape | None:
        """One stride to an axis, None where an axis has several that do not merge."""
        merged = [merge(axis) for axis in self.axes]
        return tuple(digit[1] for digit in merged if digit) if all(merged) else None

    def permuted(self, order: Sequence[int]) -> View:
        return replace(self, axes=tuple(self.axes[a] for a in order))

    def sliced(self, axis: int, start: int, extent: Extent) -> View | None:
        digit = merge(self.axes[axis])
        if digit is None:
            return None
        axes = (*self.axes[:axis], ((extent, digit[1]),), *self.axes[axis + 1 :])
        return replace(self, axes=axes, offset=self.offset + start * digit[1])

    def selected(self, axis: int, index: int) -> View | None:
        """One index of an axis, which goes."""
        sliced = self.sliced(axis, index, 1)
        return None if sliced is None else sliced.permuted([a for a in range(len(self.axes)) if a != axis])

    def broadcast(self, shape: Shape) -> View | None:
        """Leading axes are added and extents of 1 repeated, as numpy does."""
        own, extra = self.shape, len(shape) - len(self.axes)
        if extra < 0:
            return None
        axes: list[Axis] = [((extent, 0),) for extent in shape[:extra]]
        for axis, have, want in zip(self.axes, own, shape[extra:], strict=True):
            if same_extent(have, want):
                axes.append(axis)
            elif is_one(have):
                axes.append(((want, 0),))
            else:
                return None
        return replace(self, axes=tuple(axes))

    def reshaped(self, shape: Shape) -> View | None:
        """The same elements in the same order under another shape; None where digits do not divide so."""
        digits = [digit for axis in self.axes for digit in axis if not is_one(digit[0])]
        axes: list[Axis] = []
        for extent in shape:
            taken: list[Digit] = []
            while not is_one(extent):
                if not digits:
                    return None
                (size, stride), *rest = digits
                left = quotient(extent, size)
                if left is not None:
                    taken.append((size, stride))
                    extent, digits = left, rest
                    continue
                inner = quotient(size, extent)
                if inner is None:
                    return None
                taken.append((extent, inner * stride))
                extent, digits = 1, [(inner, stride), *rest]
            axes.append(tuple(taken) or ((1, 0),))
        return None if digits else replace(self, axes=tuple(axes))


def merge(axis: Axis) -> Digit | None:
    """The digits of an axis as one, None where they are not evenly spaced."""
    *outer, (extent, stride) = axis
    for size, step in reversed(outer):
        if not same_extent(step, stride * extent):
            return None
        extent = size * extent
    return extent, stride


def quotient(a: Extent, b: Extent) -> Extent | None:
    """a / b where that is provably whole."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    if same_extent(a, b):
        return 1
    if isinstance(a, int):
        return None
    ratio = sym.Analyzer().simplify(tirx.floordiv(a, b))
    if not same_extent(ratio * b, a):
        return None
    return int(ratio) if isinstance(ratio, tirx.IntImm) else ratio


def view_of(expr: Any, weights: Any) -> View | None:
    """The view that an expression is; None for tensors of unknown rank. `weights` is the function's WeightFolder."""
    shape = static_shape(expr)
    if shape is None:
        return None
    call = weights.bindings.get(expr) if isinstance(expr, relax.Var) else None
    if isinstance(call, relax.Var):
        return view_of(call, weights)
    view = derived(call, shape, weights) if call is not None else None
    return whole(expr, shape) if view is None else view


def number(weights: Any, expr: Any) -> float | None:
    """The value of a float constant of one element, if it is finite and not 0."""
    value = weights.array(expr)
    if value is None or value.size != 1 or value.dtype.kind != "f":
        return None
    return float(value.reshape(())) if np.isfinite(value).all() and value.all() else None


def whole(expr: Any, shape: Shape) -> View:
    """A tensor as it lies in memory."""
    axes: list[Axis] = []
    stride: Extent = 1
    for extent in reversed(shape):
        axes.insert(0, ((extent, stride),))
        stride = extent * stride
    return View(expr, tuple(axes))


def derived(call: Any, shape: Shape, weights: Any) -> View | None:
    """The view that a call makes of its argument, None where it is none."""
    if isinstance(call, relax.TupleGetItem):
        return split_part(call, weights)
    name = op_name(call)
    if name == "relax.multiply":
        return multiplied(call, shape, weights)
    if name == "relax.take":
        return taken(call, weights)
    if name not in MOVES:
        return None
    base = view_of(call.args[0], weights)
    return None if base is None else MOVES[name](base, call, shape)


def multiplied(call: Any, shape: Shape, weights: Any) -> View | None:
    for x, factor in (call.args, list(reversed(call.args))):
        value = number(weights, factor)
        if value is not None:
            base = view_of(x, weights)
            return None if base is None or len(base.axes) != len(shape) else replace(base, scale=base.scale * value)
    return None


def taken(call: Any, weights: Any) -> View | None:
    """take with one constant index."""
    index, base = weights.array(settled(call.args[1], weights)), view_of(call.args[0], weights)
    if index is None or base is None or index.ndim or call.attrs.axis is None:
        return None
    axis = int(call.attrs.axis) % len(base.axes)
    extent, at = base.shape[axis], int(index)
    return base.selected(axis, at % extent) if isinstance(extent, int) and -extent <= at < extent else None


def settled(expr: Any, weights: Any) -> Any:
    """The branch of a `where` whose condition is known: exporters to ONNX guard indices with one."""
    call = weights.lookup(expr)
    condition = weights.array(call.args[0]) if op_name(call) == "relax.where" else None
    return expr if condition is None or condition.size != 1 else call.args[1 if condition.all() else 2]


def split_part(item: Any, weights: Any) -> View | None:
    """One result of a split."""
    call = weights.lookup(item.tuple_value)
    if op_name(call) != "relax.split":
        return None
    base, sections = view_of(call.args[0], weights), call.attrs.indices_or_sections
    if base is None:
        return None
    axis = int(call.attrs.axis) % len(base.axes)
    extent = base.shape[axis]
    if not isinstance(extent, int):
        return None
    if isinstance(sections, int) or hasattr(sections, "value"):
        bounds = [*range(0, extent, -(-extent // int(sections))), extent]
    else:
        bounds = [0, *integers(sections), extent]
    start, end = bounds[item.index : item.index + 2]
    return base.sliced(axis, start, end - start) if 0 <= start <= end <= extent else None


def move_slice(base: View | None, call: Any, shape: Shape) -> View | None:
    """strided_slice with steps of 1 and constant begins."""
    assert base is not None
    axes, begin, _end, *strides = (integers_or_none(argument) for argument in call.args[1:])
    if axes is None or begin is None or (strides and (strides[0] is None or any(s != 1 for s in strides[0]))):
        return None
    for axis, start in zip(axes, begin, strict=True):
        axis %= len(base.shape)
        extent = base.shape[axis]
        if start < 0 and not isinstance(extent, int):
            return None
        base = base.sliced(axis, start + extent if start < 0 else start, shape[axis])
        if base is None:
            return None
    return base


def integers_or_none(argument: Any) -> tuple[int, ...] | None:
    """The numbers of a tuple argument, None if one is symbolic."""
    fields = getattr(argument, "fields", None)
    if fields is None or not all(hasattr(field, "value") for field in fields):
        return None
    return tuple(int(field.value) for field in fields)


MOVES: dict[str, Callable[[View, Any, Shape], View | None]] = {
    "relax.permute_dims": lambda base, call, shape: base.permuted(permutation(call)),
    "relax.reshape": lambda base, call, shape: base.reshaped(shape),
    "relax.expand_dims": lambda base, call, shape: base.reshaped(shape),
    "relax.squeeze": lambda base, call, shape: base.reshaped(shape),
    "relax.flatten": lambda base, call, shape: base.reshaped(shape),
    "relax.broadcast_to": lambda base, call, shape: base.broadcast(shape),
    "relax.strided_slice": move_slice,
}


def is_one(extent: Extent) -> bool:
    return isinstance(extent, int) and extent == 1


def product(extents: Any) -> Extent:
    return reduce(lambda a, b: a * b, extents, 1)
