"""matmul(x, permute_dims(W)), matmul(x, W), matmul(W, x), einsum  -->  R.structured.dense(x, W (out, in), layer="...")
conv1d, conv2d in any layout, with or without a separate pad   -->  R.structured.conv2d(x NCHW, W OIHW, layer="...")

Layers carry their weight as a constant and the name of the parameter it was computed from. All other parameters are
bound as constants, so that the result takes the inputs only. Everything that is no layer stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import ModelError
from tvm_structured.relay_passes.expressions import FLOAT32, count_uses
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.match_conv import match_conv
from tvm_structured.relay_passes.match_dense import match_dense
from tvm_structured.relay_passes.name_layers import LayerNames, is_identical
from tvm_structured.relay_passes.recognize_tir import recognize
from tvm_structured.structures.layer import Array


@tvm.transform.module_pass(opt_level=0, name="CanonicalizeLayers")
class CanonicalizeLayers:
    """Layers of `main` become structured operators named by their parameter.

    `params`: Relax variable name -> value, for every parameter of `main` that is no input (the first `num_input` are
    inputs; without that attribute, those that `params` does not name). `names`: Relax variable name -> name of the
    parameter. `dtypes`: the types of which a layer may be; all its tensors have one type. Raises ModelError for a
    parameter without a value and for a value of another shape or type.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        dtypes: tuple[str, ...] = FLOAT32,
    ) -> None:
        self.params, self.names, self.dtypes = dict(params or {}), dict(names or {}), dtypes

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        dialect.register()
        function = main_of(mod)
        params = weights_of(function, self.params)
        names = tied_names(function, params, self.names)
        mod = _Canonicalizer(mod, function, WeightFolder(mod, function, params, names), self.dtypes).run(function)
        mod = relax.transform.BindParams("main", params)(mod)
        mod.update_func(mod.get_global_var("main"), mod["main"].without_attr("params"))  # the importers' own values
        return mod


def main_of(mod: Any) -> Any:
    """The Relax function `main`. Raises ModelError where there is none."""
    functions = {var.name_hint: function for var, function in mod.functions_items()}
    if not isinstance(functions.get("main"), relax.Function):
        raise ModelError(
            f"the module has no Relax function 'main', only {sorted(functions)}; rename its entry function"
        )
    return functions["main"]


def weights_of(function: Any, params: Mapping[str, Any]) -> dict[str, Array]:
    """The values of all parameters that are no inputs, checked against their declared types."""
    attrs = function.attrs or {}
    if "num_input" in attrs:
        candidates = list(function.params)[int(attrs["num_input"]) :]
    else:
        candidates = [var for var in function.params if var.name in params]
    for var in candidates:
        if var.name not in params:
            raise ModelError(f"parameter {var.name!r} of 'main' has no value; pass it in params")
    return {var.name: checked(var, np.asarray(params[var.name])) for var in candidates}


def checked(var: Any, value: Array) -> Array:
    shape = dialect.static_shape(var) if isinstance(var.ty, relax.TensorType) else None
    fits = shape is None or (
        len(shape) == value.ndim
        and all(not isinstance(extent, int) or extent == n for extent, n in zip(shape, value.shape, strict=True))
    )
    if not fits or str(var.ty.dtype) != str(value.dtype):
        raise ModelError(
            f"parameter {var.name!r}: the model declares {shape} {var.ty.dtype}, the value is {value.shape} "
            f"{value.dtype}; pass the parameters that belong to this model"
        )
    return value


def tied_names(function: Any, params: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, str]:
    """Tied parameters go by the name of the first. torch.export lists them all and reads only the last of them:
    a parameter that nobody reads is the last one that is read and equals it."""
    uses = count_uses(function.body)
    weights = [var for var in function.params if var.name in params]
    tied = {var.name: names.get(var.name, var.name) for var in weights}
    renamed: set[str] = set()
    for position, unread in enumerate(weights):
        if uses[unread]:
            continue
        later = (var for var in reversed(weights[position + 1 :]) if uses[var])
        twin = next((var for var in later if is_identical(params[unread.name], params[var.name])), None)
        if twin is not None and twin.name not in renamed:
            tied[twin.name] = tied[unread.name]
            renamed.add(twin.name)
    return tied


@mutator
class _Canonicalizer(PyExprMutator):
    """Also what the matchers see.

    `dtypes`: what a layer may be of. Of the function as it was: `weights`, `reads`, `lookup` and `source`. For the new
    one: `names`, `visit` (rewrite an input) and `emit` (bind an expression).
    """

    def __init__(self, mod: Any, function: Any, weights: WeightFolder, dtypes: tuple[str, ...]) -> None:
        super().__init__(mod)
        self.dtypes = dtypes
        self.mod, self.weights, self.names = mod, weights, LayerNames(find_calls(mod))
        self.reads, self.lookup = count_uses(function), weights.bindings.get

    def run(self, function: Any) -> Any:
        rewritten = relax.analysis.remove_all_unused(self.visit_expr(function))
        self.builder_.update_func(self.mod.get_global_var("main"), rewritten)
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        given = LayerCall.of(call)
        if given is not None:
            return self.with_constants(given)
        layer = match_conv(self, call)
        if layer is None:
            layer = match_dense(self, self.meaning(call), call)
        return super().visit_call_(call) if layer is None else layer

    def with_constants(self, given: LayerCall) -> Any:
        """A layer that is structured in the model already; its factors may be expressions of weights."""
        return replace(
            given,
            x=self.visit(given.x),
            factors=tuple(self.constant(factor) for factor in given.factors),
            operands=tuple(self.constant(operand) for operand in given.operands),
        ).to_relax()

    def constant(self, expr: Any) -> Any:
        value = self.weights.array(expr)
        return self.visit(expr) if value is None else relax.const(value, str(value.dtype))

    def visit(self, expr: Any) -> Any:
        return self.visit_expr(expr)

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr)

    def source(self, expr: Any) -> Any:
        """The expression behind a variable, TensorIR read as the operator it stands for."""
        return self.meaning(self.weights.lookup(expr))

    def meaning(self, expr: Any) -> Any:
        recognised = recognize(self.mod, expr)
        return expr if recognised is None else recognised
