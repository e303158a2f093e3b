"""quantized.conv2d(x, W) on an image of few channels  -->  quantized.conv2d(patches(x), W as 1 x 1)

The accelerator multiplies blocks of channels. Where a pixel fills a part of a block, most of its work is with zeros: of
the 49 products of a 7 x 7 kernel on 3 channels 10 are left when the 147 values under the kernel lie behind each other.
The CPU brings them there where it has just made the integers; it moves them and computes nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.tirx.script.builder import ir as I

from tvm_structured.dialect import static_shape
from tvm_structured.errors import VTAError
from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.expressions import op_name
from tvm_structured.relay_passes.vta_operators import operator_of
from tvm_structured.schedules.emit import arg, either, i64, prim_func, root_block, serial
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower import lower
from tvm_structured.vta.timing import model


@tvm.transform.module_pass(opt_level=0, name="GatherPatches")
class GatherPatches:
    """For convolutions whose input the CPU makes, where the modelled cycles fall."""

    def __init__(self, config: VTAConfig) -> None:
        self.config = config

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        gatherer = _Gatherer(mod, self.config)
        gatherer.builder_.update_func(mod.get_global_var("main"), gatherer.visit_expr(main_of(mod)))
        return gatherer.builder_.get()


@mutator
class _Gatherer(PyExprMutator):
    def __init__(self, mod: Any, config: VTAConfig) -> None:
        super().__init__(mod)
        self.config = config

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        before = QuantizedCall.of(call)
        if before is None or not self.is_from_cpu(before.inputs[0]):
            return call
        after = gathered(before, self.config)
        if after is None or cycles(after, self.config) >= cycles(before, self.config):
            return call
        image = before.inputs[0]
        func = self.builder_.add_func(patches_func(before, static_shape(image)), "patches")
        patches = self.builder_.emit(relax.call_tir(func, [image], after.inputs[0].ty))
        return replace(after, inputs=(patches, *before.inputs[1:])).to_relax()

    def is_from_cpu(self, x: Any) -> bool:
        """Quantized from float32, or an argument."""
        source = self.lookup_binding(x) if isinstance(x, relax.Var) else None
        return source is None or op_name(source) == "relax.quantize"


def gathered(call: QuantizedCall, config: VTAConfig) -> QuantizedCall | None:
    """The convolution on a variable with the shape of its patches; None for what is none, or has no empty lanes."""
    shape = static_shape(call.inputs[0])
    if call.op != "conv2d" or call.groups != 1 or shape is None or not all(isinstance(n, int) for n in shape):
        return None
    weight = call.weight()
    out, channels, *kernel = weight.shape
    taps, block = math.prod(kernel), config.block
    if -(-channels * taps // block) >= -(-channels // block) * taps:
        return None
    flat = relax.const(np.ascontiguousarray(weight.reshape(out, -1, 1, 1)))
    rows = (shape[0], channels * taps, *call.output_shape()[2:])
    return replace(
        call,
        inputs=(relax.Var("patches", relax.TensorType(list(rows), "int8")), *call.inputs[1:]),
        constants=(flat, *call.constants[1:]),
        strides=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
    )


def cycles(call: QuantizedCall, config: VTAConfig) -> float:
    """Modelled, of the default schedule; infinite where there is no program."""
    operator = operator_of([call])
    if operator is None:
        return math.inf
    try:
        return model(lower(operator, [static_shape(x) for x in call.inputs], config).program).cycles
    except VTAError:
        return math.inf


def patches_func(call: QuantizedCall, shape: tuple[int, ...]) -> Any:
    """PrimFunc(x (n, c, h, w), patches (n, c * kh * kw, oh, ow)): the values under the kernel, in the weight's order;
    outside the image they are zero."""
    n, channels, height, width = shape
    kh, kw = call.weight_shape()[2:]
    rows, columns = call.output_shape()[2:]
    top, left = call.padding[:2]
    with prim_func("patches") as made:
        x = arg("x", shape, "int8")
        patches = arg("patches", (n, channels * kh * kw, rows, columns), "int8")
        with root_block(), serial(0, i64(n)) as b, serial(0, i64(channels)) as c, serial(0, i64(kh)) as i:
            with serial(0, i64(rows)) as y:
                row = I.Bind(y * call.strides[0] + i * call.dilation[0] - top)
                inside = tirx.all(row >= i64(0), row < i64(height))
                for j in range(kw):
                    offset = j * call.dilation[1] - left  # of the first column
                    begin, end = columns_inside(offset, call.strides[1], width, columns)
                    place = (c * kh + i) * kw + j

                    def zero(first: int, last: int, place: Any = place) -> None:
                        with serial(i64(first), i64(last)) as z:
                            I.buffer_store(patches, I.int8(0), [b, place, y, z])

                    def copy(begin: int = begin, end: int = end, offset: int = offset, place: Any = place) -> None:
                        with serial(i64(begin), i64(end)) as z:
                            value = x[b, c, row, z * call.strides[1] + offset]
                            I.buffer_store(patches, value, [b, place, y, z])

                    zero(0, begin)
                    zero(end, columns)
                    either(inside, copy, partial(zero, begin, end))
    return made.func


def columns_inside(offset: int, stride: int, width: int, columns: int) -> tuple[int, int]:
    """Columns [begin, end) of the output with 0 <= column * stride + offset < width."""
    begin = min(max(-(offset // stride), 0), columns)
    return begin, max(min((width - 1 - offset) // stride + 1, columns), begin)
