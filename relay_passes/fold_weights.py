"""Values and names of expressions that depend on weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprVisitor, visitor

from tvm_structured.dialect import constant
from tvm_structured.relay_passes.evaluate_operators import evaluate, slice_bounds
from tvm_structured.relay_passes.expressions import op_name
from tvm_structured.structures.layer import Array


@dataclass(frozen=True, eq=False)
class Origin:
    """The parameter or constant that a weight was computed from; `name` is None for a constant."""

    name: str | None
    value: Array
    part: str = ""  # "[1]": the second of equal slices


@dataclass(frozen=True, eq=False)
class Weight:
    """A known value and the largest parameter that contributed to it (a named one before a constant)."""

    value: Array
    origin: Origin


class WeightFolder:
    """Evaluates expressions of one function, on demand; those that need an input are None.

    `params`: Relax variable name -> value. `names`: Relax variable name -> name of the parameter.
    """

    def __init__(
        self, mod: Any, function: Any, params: Mapping[str, Array] | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        params, names = params or {}, names or {}
        self.mod = mod
        self.known: dict[Any, Any] = {
            var: Weight(params[var.name], Origin(names.get(var.name, var.name), params[var.name]))
            for var in function.params
            if var.name in params
        }
        bindings = _Bindings()
        bindings.visit_expr(function)
        self.bindings = bindings.values
        # Decided once, front to back: asking on demand would walk the whole network for every operand
        self.weight_only = set(self.known)
        for var, value in self.bindings.items():
            if is_computation(value) and self.weight_only.issuperset(relax.analysis.free_vars(value)):
                self.weight_only.add(var)

    def lookup(self, expr: Any) -> Any:
        """The expression that a variable is bound to, through other names of it; any other expression as it is."""
        while isinstance(expr, relax.Var) and expr in self.bindings:
            expr = self.bindings[expr]
        return expr

    def fold(self, expr: Any) -> Weight | None:
        """The value of a tensor expression, None where it is not known at compile time."""
        folded = self._fold(expr)
        return folded if isinstance(folded, Weight) else None

    def array(self, expr: Any) -> Array | None:
        folded = self.fold(expr)
        return None if folded is None else folded.value

    def _fold(self, expr: Any) -> Any:
        """Weight, list of what the fields of a tuple are, or None."""
        if isinstance(expr, relax.Var):
            return self._fold_variable(expr)
        value = constant(expr)
        if value is not None:
            return Weight(value, Origin(None, value))
        if isinstance(expr, relax.Tuple):
            return [self._fold(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            fields = self._fold(expr.tuple_value)
            return fields[expr.index] if isinstance(fields, list) else None
        return self._fold_call(expr) if isinstance(expr, ir.Call) else None

    def _fold_variable(self, var: Any) -> Any:
        if var not in self.weight_only:
            return None
        if var not in self.known:
            self.known[var] = self._fold(self.bindings[var])
        return self.known[var]

    def _fold_call(self, call: Any) -> Any:
        inputs = [self._fold(argument) if holds_tensors(argument.ty) else None for argument in call.args]
        weights: list[Weight] = []
        for argument, item in zip(call.args, inputs, strict=True):
            fields = item if isinstance(item, list) else [item]
            if holds_tensors(argument.ty) and not all(isinstance(field, Weight) for field in fields):
                return None
            weights += [field for field in fields if field is not None]
        value = evaluate(self.mod, call, [raw(item) for item in inputs])
        if value is None:
            return None
        origin = largest([weight.origin for weight in weights])
        if isinstance(value, list):
            return [Weight(v, replace(origin, part=f"{origin.part}[{i}]")) for i, v in enumerate(value)]
        return Weight(value, replace(origin, part=origin.part + slice_part(call, inputs)))


def largest(origins: list[Origin]) -> Origin:
    """The named one with most elements, the first of equals; constants only where nothing has a name."""
    return max(origins, key=lambda o: (o.name is not None, o.value.size), default=Origin(None, np.empty(0)))


def raw(item: Any) -> Any:
    return [field.value for field in item] if isinstance(item, list) else getattr(item, "value", None)


def holds_tensors(ty: Any) -> bool:
    """A tensor, or a tuple of tensors; not the tuples of integers that some operators take."""
    if isinstance(ty, relax.TupleType):
        return all(isinstance(field, relax.TensorType) for field in ty.fields)
    return isinstance(ty, relax.TensorType)


def is_computation(value: Any) -> bool:
    """Plain dataflow: no branch, no closure."""
    return isinstance(value, (ir.Call, relax.Tuple, relax.TupleGetItem, relax.Var, ir.GenericConst))


def slice_part(call: Any, inputs: list[Any]) -> str:
    """What a slice is called: "[2]" for the third of equal parts or row 2, "[3:7]" otherwise, "" for no slice."""
    name = op_name(call)
    if name == "relax.take" and call.attrs.axis is not None and inputs[1].value.ndim == 0:
        return f"[{int(inputs[1].value)}]"
    if name != "relax.strided_slice":
        return ""
    parts = []
    for axis, begin, end, stride in zip(*slice_bounds(call), strict=True):
        extent = inputs[0].value.shape[axis]
        first, last, _ = slice(begin, end, stride).indices(extent)
        length = last - first
        if length == extent:
            continue
        if stride != 1:
            parts.append(f"[{first}:{last}:{stride}]")
        elif length > 0 and first % length == 0 and extent % length == 0:
            parts.append(f"[{first // length}]")
        else:
            parts.append(f"[{first}:{last}]")
    return "".join(parts)


@visitor
class _Bindings(PyExprVisitor):
    """Variable -> bound expression, in order of evaluation, nested scopes included."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        self.values[binding.var] = binding.value
        super().visit_var_binding_(binding)

    def visit_match_cast_(self, binding: Any) -> None:
        self.values[binding.var] = binding.value
        super().visit_match_cast_(binding)
