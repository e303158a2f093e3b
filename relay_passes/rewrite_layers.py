"""R.structured.dense(x, W, layer="fc1.weight")  -->  R.structured.low_rank(x, u, v, layer="fc1.weight")

for every layer the choices name; the epilogue's operands and the geometry are kept. A layer that is left dense takes
its scale into the weight.
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
            if name not in layers and name in given and given[name].name == structure.name:
                continue  # the model's own structure
            check_choice(name, structure, layers)
            rewrites[name] = rewritten(calls[name], structure)
        return _Rewriter(mod, rewrites).run()


def check_choice(name: str, structure: Structure, layers: Mapping[str, Layer]) -> None:
    """Raise PlanError unless the structure can take the place of that layer's weight."""
    layer = layers.get(name)
    if layer is None:
        known = ", ".join(layers) or "none"
        raise PlanError(
            f"the plan names layer {name!r}, which this model does not have (its layers: {known}); make a new plan"
        )
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


class Rewrite:
    """How the calls of one layer change. The factors are constants that all its uses share."""

    def __init__(self, structure: Structure, layer: LayerCall, scale: Array | None) -> None:
        """`scale`, one value per output feature, goes into the weight; None leaves the calls' own."""
        self.structure, self.scale = structure, scale
        if isinstance(structure, Unstructured):
            weight = constant(layer.factors[0])
            factors = layer.factors if scale is None else (relax.const(scaled(weight, scale)),)
            self.op, self.sizes, self.factors = layer.op, layer.sizes, tuple(factors)
            return
        arrays = structure.factors
        if scale is not None:
            arrays = {**arrays, "weight": scaled(arrays["weight"], scale)}
        self.op, self.sizes = structure.name, structure.sizes_of
        self.factors = tuple(factor_constant(array) for array in arrays.values())

    def apply(self, call: LayerCall) -> LayerCall:
        if self.scale is not None:
            operands = operands_of(call)
            del operands["scale"]
            call = with_operands(call, operands)
        return replace(call, op=self.op, sizes=self.sizes, factors=self.factors)


def rewritten(calls: list[LayerCall], structure: Structure) -> Rewrite:
    """Scale is folded where the structure holds a weight with an output axis, and all uses have the same scale."""
    canonical = [call for call in calls if call.is_canonical]
    scales = [constant(operands_of(call).get("scale")) for call in canonical]
    shared = scales[0] if "weight" in structure.factors else None
    if shared is not None and not all(s is not None and np.array_equal(s, shared) for s in scales):
        shared = None
    return Rewrite(structure, canonical[0], shared)


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
        if unpacked is None or not unpacked.is_canonical or unpacked.layer not in self.rewrites:
            return call
        return self.rewrites[unpacked.layer].apply(unpacked).to_relax()
