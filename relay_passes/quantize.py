"""structured.conv2d(x, W, ...)  -->  quantized.conv2d(x int8, W int8, ...)

and likewise for all layers, pooling, sums, concatenations and what only moves values, with `quantize` and
`dequantize` where int8 and float32 meet. Scales come from observed ranges; everything else, layers that are to be
kept, and tensors of symbolic shape stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured import dialect, quantized
from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.expressions import count_uses, is_static, op_name
from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.integer_scales import LEVELS
from tvm_structured.relay_passes.observe_tensors import is_tensor, tensor_names
from tvm_structured.relay_passes.quantize_layers import quantize_layer
from tvm_structured.relay_passes.quantize_operators import OPERATORS
from tvm_structured.structures.layer import Array


@dataclass(frozen=True)
class Integer:
    """An int8 expression and the value of its 1."""

    expr: Any
    scale: float


@tvm.transform.module_pass(opt_level=0, name="Quantize")
class Quantize:
    """`ranges`: name of a tensor, as `tensor_names` has it, to the largest magnitude it shall represent; names
    `layer//core0` are the states of a tensor train. `keep`: names of layers that stay float32."""

    def __init__(self, ranges: Mapping[str, float], keep: Collection[str] = ()) -> None:
        self.ranges, self.keep = dict(ranges), frozenset(keep)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        dialect.register()
        quantized.register()
        main = main_of(mod)
        quantizer = _Quantizer(mod, main, self.ranges, self.keep)
        function = relax.analysis.remove_all_unused(quantizer.visit_expr(main))
        quantizer.builder_.update_func(mod.get_global_var("main"), function)
        return quantizer.builder_.get()


@mutator
class _Quantizer(PyExprMutator):
    """One walk, front to back. A float32 variable may have an integer form, and gets its float32 form back from it only
    where somebody reads that."""

    def __init__(self, mod: Any, function: Any, ranges: Mapping[str, float], keep: frozenset[str]) -> None:
        super().__init__(mod)
        self.ranges, self.keep, self.names = ranges, keep, tensor_names(function)
        self.integers: dict[Any, Integer] = {}
        self.restored: set[Any] = set()
        self.weights = WeightFolder(mod, function)

    # -- what the rules ask ----------------------------------------------------------------------------

    def scale_of(self, var: Any) -> float | None:
        """The value of 1 in the int8 form that the observed range asks for; None for tensors that were always 0."""
        return self.scale(self.names.get(var, ""))

    def scale(self, name: str) -> float | None:
        largest = self.ranges.get(name, 0.0)
        return largest / LEVELS if largest > 0 else None

    def integer(self, expr: Any) -> Integer | None:
        """The int8 form of a tensor, quantized here if need be; None where it cannot have one."""
        if expr in self.integers:
            return self.integers[expr]
        scale = self.scale_of(expr) if isinstance(expr, relax.Var) else None
        if scale is None:
            return None
        return self.remember(expr, quantize(self.visit_expr(expr), scale), scale)

    def remember(self, var: Any, expr: Any, scale: float) -> Integer:
        self.integers[var] = Integer(self.emit(expr), scale)
        return self.integers[var]

    def is_integer(self, expr: Any) -> bool:
        """Whether an int8 form is there already."""
        return expr in self.integers

    def lookup(self, expr: Any) -> Any:
        """What a variable of the function as it was is bound to; any other expression as it is."""
        return self.weights.lookup(expr)

    def known(self, expr: Any) -> Array | None:
        """The value of an expression of constants."""
        return self.weights.array(expr)

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr)

    # -- the walk --------------------------------------------------------------------------------------

    def visit_var_binding_(self, binding: Any) -> None:
        made = self.integer_form(binding.var, binding.value)
        if made is None:
            self.restore(binding.value)
            super().visit_var_binding_(binding)
            return
        integer = self.remember(binding.var, *made)
        if not isinstance(binding.var, relax.DataflowVar):  # a result of the function
            self.restored.add(binding.var)
            result = self.builder_.emit_output(dequantize(integer.expr, integer.scale))
            self.set_var_remap(binding.var, result)

    def integer_form(self, var: Any, value: Any) -> tuple[Any, float] | None:
        """(int8 expression, scale) of a binding that is computed in integers."""
        if value in self.integers:
            return self.integers[value].expr, self.integers[value].scale
        if not is_tensor(var) or not is_static(static_shape(var)):
            return None
        layer = LayerCall.of(value)
        if layer is not None:
            return None if layer.layer in self.keep else quantize_layer(self, layer, var)
        rule = OPERATORS.get(op_name(value))
        return None if rule is None else rule(self, value, var)

    def restore(self, value: Any) -> None:
        """Float32 forms of the variables that an expression reads."""
        for var in count_uses(value):
            if var in self.integers and var not in self.restored and var in self.weights.bindings:
                integer = self.integers[var]
                self.restored.add(var)
                self.set_var_remap(var, self.emit(dequantize(integer.expr, integer.scale)))


def quantize(x: Any, scale: float) -> Any:
    return relax.op.quantize(x, relax.const(scale, "float32"), relax.const(0, "int8"), out_dtype="int8")


def dequantize(x: Any, scale: float) -> Any:
    return relax.op.dequantize(x, relax.const(scale, "float32"), relax.const(0, "int8"), out_dtype="float32")
