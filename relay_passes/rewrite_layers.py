"""R.structured.dense(x, W, layer="fc1.weight")  -->  R.structured.low_rank(x, u, v, layer="fc1.weight")

for every layer the choices name; the epilogue's operands and the geometry are kept. A layer that is left dense takes
its scale into the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall, constant
from tvm_structured.errors import PlanError
from tvm_structured.relay_passes.compose_epilogue import operands_of, with_operands
from tvm_structured.relay_passes.find_layers import find_calls, find_layers, find_structures
from tvm_structured.structures import Layer, Structure, Unstructured
from tvm_structured.structures.layer import Array


@tvm.transform.module_pass(opt_level=0, name="RewriteLayers")
class RewriteLayers:
    """Layer name -> structure. Layers that are not named stay as they are.

    Raises PlanError for a name that is no layer of the module and for a structure that does not fit its layer.
    """

    def __init__(self, choices: Mapping[str, Structure]) -> None:
        self.choices = dict(choices)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        dialect.register()
        layers, given, calls = find_layers(mod), find_structures(mod), find_calls(mod)
        rewrites = {}
        for name, structure in self.choices.items():
            if name not in layers and name in given:
                if structure.name == Unstructured.name:
                    rewrites[name] = expansion_of(calls[name][0])
                    continue
                if given[name].name == structure.name:
                    continue  # the model's own structure
            check_choice(name, structure, layers)
            rewrites[name] = rewrite_of(calls[name], structure)
        return _Rewriter(mod, rewrites).run()


def check_choice(name: str, structure: Structure, layers: Mapping[str, Layer]) -> None:
    """Raise PlanError unless the structure can take the place of that layer's weight."""
    layer = layers.get(name)
    if layer is None:
        known = ", ".join(layers) or "none"
        raise PlanError(f"the plan names {name!r}, which this model lacks (its layers: {known}); make a new plan")
    if tuple(structure.shape) != layer.matrix.shape:
        raise PlanError(
            f"{name}: the plan's {structure.name} has shape {tuple(structure.shape)}, the layer's matrix is "
            f"{layer.matrix.shape}; make a new plan for this model"
        )
    if not structure.takes(layer):
        raise PlanError(
            f"{name}: {structure.name} is not defined for this {type(layer).__name__} (weight {layer.weight.shape}, "
            f"groups {getattr(layer, 'groups', 1)}); choose another structure or dense"
        )


@dataclass(frozen=True, eq=False)
class Rewrite:
    """How the calls of one layer change. The factors are constants that all its uses share."""

    op: str
    sizes: dict[str, Any]
    factors: tuple[Any, ...]
    holds_scale: bool = False  # the factors took the calls' scale in
    expands: bool = False  # calls that are structured in the model become canonical ones

    def apply(self, call: LayerCall) -> LayerCall:
        if self.holds_scale:
            operands = operands_of(call)
            del operands["scale"]
            call = with_operands(call, operands)
        return replace(call, op=self.op, sizes=self.sizes, factors=self.factors)


def expansion_of(call: LayerCall) -> Rewrite:
    expanded = call.expanded()
    return Rewrite(expanded.op, expanded.sizes, expanded.factors, expands=True)


def rewrite_of(calls: list[LayerCall], structure: Structure) -> Rewrite:
    """A scale goes into the factor `weight`, whose first axis is the output's, if the structure has one."""
    calls = [call for call in calls if call.is_canonical]
    scale = common_scale(calls) if "weight" in structure.factors else None
    if not isinstance(structure, Unstructured):
        arrays = structure.factors
        if scale is not None:
            arrays = {**arrays, "weight": scaled(arrays["weight"], scale)}
        factors = tuple(factor_constant(array) for array in arrays.values())
        return Rewrite(structure.name, structure.sizes_of, factors, scale is not None)
    factors = calls[0].factors
    if scale is not None:
        factors = (relax.const(scaled(constant(factors[0]), scale)),)
    return Rewrite(calls[0].op, calls[0].sizes, factors, scale is not None)


def common_scale(calls: list[LayerCall]) -> Array | None:
    """The scale of all calls; None where one has none or another one: the weight would no longer be shared."""
    scales = [constant(operands_of(call).get("scale")) for call in calls]
    first = scales[0]
    if first is None or not all(scale is not None and np.array_equal(scale, first) for scale in scales):
        return None
    return first


def scaled(weight: Any, scale: Array) -> Array:
    """weight[o, ...] * scale[o], rounded once."""
    by_row = scale.astype(np.float64).reshape(-1, *(1,) * (weight.ndim - 1))
    product: Array = (weight.astype(np.float64) * by_row).astype(np.float32)
    return product


def factor_constant(array: Any) -> Any:
    """Numbers as float32, indices as int64."""
    array = np.asarray(array)
    dtype = "float32" if array.dtype.kind == "f" else "int64"
    return relax.const(np.ascontiguousarray(array.astype(dtype)), dtype)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: Any, rewrites: Mapping[str, Rewrite]) -> None:
        super().__init__(mod)
        self.mod, self.rewrites = mod, rewrites

    def run(self) -> Any:
        for var, function in self.mod.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(var, relax.analysis.remove_all_unused(self.visit_expr(function)))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        unpacked = LayerCall.of(call)
        rewrite = None if unpacked is None else self.rewrites.get(unpacked.layer)
        if unpacked is None or rewrite is None or unpacked.is_canonical == rewrite.expands:
            return call
        return rewrite.apply(unpacked).to_relax()
