"""conv2d(x (n, c, h, w)) --> from_blocks(conv2d(to_blocks(x) (n, c / lanes, h, w, lanes)))

and the same for pooling, elementwise operations and concatenation of what is in blocks already: images stay in blocks
of channels from layer to layer, and are converted at the edges only (a conversion that nobody reads is dropped).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.block_rules import RULES
from tvm_structured.relay_passes.expressions import is_float32, op_name
from tvm_structured.relay_passes.lower_structured import bindable
from tvm_structured.schedules.base import blocked_shape
from tvm_structured.schedules.channel_blocks import block_func, unblock_func
from tvm_structured.schedules.cpu import Cpu

MOST_PADDING = 1.4  # lanes by channels; beyond, empty lanes cost more than NCHW
FEWEST_CONVOLUTIONS = 2  # that are connected: a single one would only be converted there and back


@tvm.transform.module_pass(opt_level=0, name="BlockLayouts")
class BlockLayouts:
    """Images in blocks of `cpu.lanes` channels between convolutions."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        rewriter = _Blocker(mod, self.cpu)
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function):
                rewriter.regions = Regions(function, self.cpu.lanes)
                rewriter.builder_.update_func(var, relax.analysis.remove_all_unused(rewriter.visit_expr(function)))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


def fits_blocks(channels: Any, lanes: int) -> bool:
    return isinstance(channels, int) and -(-channels // lanes) * lanes <= MOST_PADDING * channels


def block_of(call: LayerCall, lanes: int) -> tuple[bool, bool]:
    """Whether a convolution may take and give blocks; (False, True) is one that begins them."""
    if call.conv is None or not is_float32(call.x) or call.x.ty.ndim != 4:
        return False, False
    (_, channels, *image), (_, outs, *_) = call.images()
    groups = call.conv.groups
    aligned = channels // groups % lanes == 0 and outs // groups % lanes == 0
    is_depthwise = groups == channels == outs
    if not all(isinstance(extent, int) for extent in image) or not (groups == 1 or aligned or is_depthwise):
        return False, False
    takes, gives = fits_blocks(channels, lanes), fits_blocks(outs, lanes)
    return takes and gives, gives and (takes or not is_depthwise)


class Regions:
    """Which convolutions of a function are connected by images that may be in blocks."""

    def __init__(self, function: Any, lanes: int) -> None:
        self.parents: dict[Any, Any] = {}
        bindings = [b for block in function.body.blocks for b in block.bindings if isinstance(b, relax.VarBinding)]
        convolutions = []
        for binding in bindings:
            layer = LayerCall.of(binding.value)
            if layer is not None:
                takes, gives = block_of(layer, lanes)
                if gives:
                    convolutions.append(binding.var)
                    self.join(binding.var, *([layer.x] if takes else []), *layer.operands)
            elif isinstance(binding.value, relax.Var):
                self.join(binding.var, binding.value)
            elif op_name(binding.value) in RULES:
                self.join(binding.var, *binding.value.args)
        self.sizes = Counter(self.root(var) for var in convolutions)

    def root(self, var: Any) -> Any:
        while var in self.parents:
            var = self.parents[var]
        return var

    def join(self, var: Any, *others: Any) -> None:
        for other in others:
            if isinstance(other, relax.Tuple):
                self.join(var, *other.fields)
            elif isinstance(other, relax.Var) and self.root(var) != self.root(other):
                self.parents[self.root(var)] = self.root(other)

    def is_worth_it(self, var: Any) -> bool:
        return self.sizes[self.root(var)] >= FEWEST_CONVOLUTIONS


@mutator
class _Blocker(PyExprMutator):
    def __init__(self, mod: Any, cpu: Cpu) -> None:
        super().__init__(mod)
        self.cpu = cpu
        self.regions: Any = None
        self.var: Any = None  # that is being bound
        self.converted: dict[Any, Any] = {}  # variable -> its blocks, within a binding block
        self.visible: set[Any] = set()  # images in blocks that this binding block made
        self.converters: set[str] = set()

    def visit_binding_block_(self, block: Any) -> Any:
        self.forget()
        return super().visit_binding_block_(block)

    def visit_dataflow_block_(self, block: Any) -> Any:
        self.forget()
        return super().visit_dataflow_block_(block)

    def forget(self) -> None:
        """Variables of a dataflow block are unknown outside."""
        self.converted.clear()
        self.visible.clear()

    def visit_var_binding_(self, binding: Any) -> None:
        self.var = binding.var
        super().visit_var_binding_(binding)

    def visit_call_(self, call: Any) -> Any:
        var = self.var
        call = self.visit_expr_post_order(call)
        layer = LayerCall.of(call)
        if layer is not None:
            return self.convolution(layer, call) if layer.conv is not None and self.regions.is_worth_it(var) else call
        rule = RULES.get(op_name(call))
        result = rule(self, call) if rule is not None and is_image(call) else None
        return call if result is None else self.from_blocks(result, call)

    def convolution(self, layer: LayerCall, call: Any) -> Any:
        lanes = self.cpu.lanes
        takes, gives = block_of(layer, lanes)
        if not gives:
            return call
        operands = [
            self.to_blocks(value) if name == "residual" else value
            for name, value in zip(layer.epilogue.operands, layer.operands, strict=True)
        ]
        x = self.to_blocks(layer.x) if takes else layer.x
        return self.from_blocks(replace(layer, x=x, operands=tuple(operands), out_block=lanes).to_relax(), call)

    def blocks_of(self, var: Any) -> Any | None:
        """The variable that holds an image's blocks, None where there is none yet."""
        if var in self.converted:
            return self.converted[var]
        value = self.lookup_binding(var) if isinstance(var, relax.Var) else None
        if isinstance(value, relax.Var):
            return self.blocks_of(value)
        if op_name(value) == "relax.call_tir" and value.args[0].name_hint in self.converters:
            blocks = value.args[1].fields[0]
            return blocks if blocks in self.visible else None
        return None

    def to_blocks(self, image: Any) -> Any:
        blocks = self.blocks_of(image)
        if blocks is None:
            shape = static_shape(image)
            stored = relax.TensorType(blocked_shape(shape, self.cpu.lanes), "float32")
            func = self.builder_.add_func(block_func((bindable(shape[0]), *shape[1:]), self.cpu), "to_blocks")
            blocks = self.builder_.emit(relax.call_tir(func, [image], stored))
            if isinstance(image, relax.Var):
                self.converted[image] = blocks
        return blocks

    def from_blocks(self, blocks: Any, image: Any) -> Any:
        """NCHW again, for whoever wants it. The last expression is not yet bound."""
        shape = static_shape(image)
        func = self.builder_.add_func(unblock_func((bindable(shape[0]), *shape[1:]), self.cpu), "from_blocks")
        self.converters.add(func.name_hint)
        stored = self.builder_.emit(blocks)
        self.visible.add(stored)
        return relax.call_tir(func, [stored], relax.TensorType(shape, "float32"))


def is_image(call: Any) -> bool:
    """float32 of rank 4, extents but the batch known."""
    shape = static_shape(call) if isinstance(call.ty, relax.TensorType) else None
    return is_float32(call) and len(shape) == 4 and all(isinstance(extent, int) for extent in shape[1:])
