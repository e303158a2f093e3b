"""Layers become what an integer machine computes one at a time, in float32 still:

    low_rank(x, u, v)               -->  dense(x, v), dense(., u);  a convolution: v's filters, then 1x1 ones by u
    winograd, and any other structure of a convolution   -->  conv2d with the weight written out
    gelu, silu within a layer       -->  after it

so that what will be int8 is a tensor, whose range calibration can observe. The parts of a layer are named
`layer//u` and `layer//v`. Dense layers of the other structures stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.layer_parts import part_name
from tvm_structured.relay_passes.compose_epilogue import operands_of, with_operands
from tvm_structured.relay_passes.expressions import is_static
from tvm_structured.schedules.base import ConvGeometry, Epilogue
from tvm_structured.structures import LowRank, Structure

AFTER = {"gelu": relax.op.nn.gelu, "gelu_tanh": relax.op.nn.gelu_tanh, "silu": relax.op.nn.silu}


@tvm.transform.module_pass(opt_level=0, name="SplitLayers")
class SplitLayers:
    """Structured layers of all Relax functions. Layers of symbolic size stay whole."""

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        splitter = _Splitter(mod)
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function):
                splitter.builder_.update_func(var, relax.analysis.remove_all_unused(splitter.visit_expr(function)))
        return splitter.builder_.get()


@mutator
class _Splitter(PyExprMutator):
    def visit_call_(self, call: Any) -> Any:
        new = self.visit_expr_post_order(call)
        layer = LayerCall.of(new)
        if layer is None or not is_static(static_shape(layer.x)):
            return new
        if layer.epilogue.activation in AFTER:
            plain = replace(layer, epilogue=replace(layer.epilogue, activation="none"))
            return AFTER[layer.epilogue.activation](self.emit(self.split(plain)))
        return new if layer.is_canonical else self.split(layer)

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr)

    def split(self, layer: LayerCall) -> Any:
        if layer.is_canonical:
            return layer.to_relax()
        structure = layer.to_structure()
        if isinstance(structure, LowRank):
            return self.split_low_rank(layer, structure)
        if layer.conv is None:
            return layer.to_relax()
        return canonical(layer, written_out(layer, structure)).to_relax()

    def split_low_rank(self, layer: LayerCall, structure: LowRank) -> Any:
        """The inner factor has the geometry, the outer one the epilogue."""
        inner = part(layer, "v")
        v, u = np.asarray(structure.v), np.asarray(structure.u)
        if layer.conv is None:
            hidden = self.emit(canonical(inner, v).to_relax())
            return canonical(replace(part(layer, "u", whole=True), x=hidden), u).to_relax()
        kh, kw = layer.conv.kernel
        filters = v.reshape(structure.rank, kh, kw, -1).transpose(0, 3, 1, 2)
        hidden = self.emit(canonical(inner, filters).to_relax())
        outer = replace(part(layer, "u", whole=True), x=hidden, conv=ConvGeometry((1, 1)))
        return canonical(outer, u[:, :, None, None]).to_relax()


def part(layer: LayerCall, name: str, whole: bool = False) -> LayerCall:
    """A part of a layer, with its epilogue (`whole`) or without."""
    named = replace(layer, layer=part_name(layer.layer, name), sizes={})
    return named if whole else replace(named, epilogue=Epilogue(), operands=())


def canonical(layer: LayerCall, weight: Any) -> LayerCall:
    """The plain layer with that weight; a scale goes into it."""
    operands = operands_of(layer)
    scale = operands.pop("scale", None)
    weight = np.asarray(weight, np.float64)
    if scale is not None:
        weight = weight * scale.value.numpy().reshape(-1, *[1] * (weight.ndim - 1))
    op = "dense" if layer.conv is None else "conv2d"
    constant = relax.const(np.ascontiguousarray(weight.astype(np.float32)))
    return replace(with_operands(layer, operands), op=op, sizes={}, factors=(constant,))


def written_out(layer: LayerCall, structure: Structure) -> Any:
    """The filters of a convolution, (out, in, kh, kw)."""
    assert layer.conv is not None
    matrix = np.asarray(structure.dense())
    kh, kw = layer.conv.kernel
    return matrix.reshape(len(matrix), kh, kw, -1).transpose(0, 3, 1, 2)
