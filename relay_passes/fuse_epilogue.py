"""What follows a layer and is read by nothing else becomes part of it: act(scale * layer(x) + bias + residual).

    multiply, divide by constants per feature    -->  scale (and bias)
    add, subtract constants per feature          -->  bias
    batch_norm(training=False)                   -->  scale and bias; the weight keeps its structure
    add of a tensor of the output's shape        -->  residual
    relu, clip, maximum/minimum, gelu, silu      -->  activation, which ends the layer

Reshapes and permutations between the layer and what follows are passed through. Those around a dense layer that only
merge leading dimensions disappear, as do pairs of permutations that undo each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.absorb_operators import ABSORB
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.compose_epilogue import with_affine
from tvm_structured.relay_passes.expressions import FLOAT32, count_uses, is_float, op_name, permutation, same_shape
from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.layer_site import VIEWS, Site, find_site
from tvm_structured.relay_passes.recognize_tir import recognize


@tvm.transform.module_pass(opt_level=0, name="FuseEpilogue")
class FuseEpilogue:
    """Epilogues of the structured operators of `main`. `dtypes`: those of the layers."""

    def __init__(self, dtypes: tuple[str, ...] = FLOAT32) -> None:
        self.dtypes = dtypes

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        dialect.register()
        function = relax.analysis.remove_all_unused(main_of(mod))  # dead readers would forbid fusing
        mod = _Fuser(mod, function, self.dtypes).run(function)
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    """One walk, front to back: each operation finds its operand's layer already holding what came before."""

    def __init__(self, mod: Any, function: Any, dtypes: tuple[str, ...]) -> None:
        super().__init__(mod)
        self.dtypes = dtypes
        self.mod, self.weights, self.reads = mod, WeightFolder(mod, function), count_uses(function)

    def run(self, function: Any) -> Any:
        rewritten = relax.analysis.remove_all_unused(self.visit_expr(function))
        self.builder_.update_func(self.mod.get_global_var("main"), rewritten)
        return self.builder_.get()

    # -- bindings ------------------------------------------------------------------------------------

    def visit_var_binding_(self, binding: Any) -> None:
        super().visit_var_binding_(binding)
        self.reads[self.visit_expr(binding.var)] = self.reads[binding.var]  # the variable may have been replaced

    def emit(self, expr: Any) -> Any:
        var = self.builder_.emit(expr)
        self.reads[var] = 1
        return var

    def lookup(self, expr: Any) -> Any | None:
        """What a variable of the new function is bound to; None for parameters and constants."""
        return self.lookup_binding(expr) if isinstance(expr, relax.Var) else None

    def meaning(self, call: Any) -> Any:
        """The operator that TensorIR stands for, where it is recognised."""
        recognised = recognize(self.mod, call)
        return call if recognised is None else recognised

    def site(self, operand: Any, reads: int = 1) -> Site | None:
        return find_site(operand, self.lookup, self.reads.__getitem__, reads)

    # -- expressions ---------------------------------------------------------------------------------

    def visit_tuple_getitem_(self, item: Any) -> Any:
        """The first result of batch_norm is what follows the layer; the others have no readers by now."""
        call = self.weights.lookup(item.tuple_value)
        if item.index == 0 and op_name(call) == "relax.nn.batch_norm" and self.reads[item.tuple_value] == 1:
            fused = self.fuse_batch_norm(call)
            if fused is not None:
                return fused
        return super().visit_tuple_getitem_(item)

    def visit_call_(self, call: Any) -> Any:
        new = self.visit_expr_post_order(call)
        if op_name(new) in VIEWS:
            simpler = self.without_reshapes(new) if op_name(new) != "relax.permute_dims" else self.without_permutes(new)
            return new if simpler is None else simpler
        layer = LayerCall.of(new)
        if layer is not None:
            permuted = self.permuted_after(layer)
            return new if permuted is None else permuted
        meaning = self.meaning(new)
        absorb = ABSORB.get(op_name(meaning))
        absorbed = absorb(self, meaning) if absorb is not None and is_float(self.dtypes, call) else None
        return new if absorbed is None else absorbed

    def fuse_batch_norm(self, call: Any) -> Any | None:
        x, attrs = self.visit_expr(call.args[0]), call.attrs
        statistics = [self.weights.array(argument) for argument in call.args[1:5]]
        site = self.site(x)
        if site is None or attrs.training or any(value is None for value in statistics):
            return None
        if int(attrs.axis) % x.ty.ndim != site.channel_axis:
            return None
        gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in statistics)
        with np.errstate(all="ignore"):  # what is not finite is refused by with_affine
            scale = (gamma if attrs.scale else 1.0) / np.sqrt(variance + float(attrs.epsilon))
            shift = (beta if attrs.center else 0.0) - mean * scale
        return self.rebuild(site, with_affine(site.layer, scale, shift))

    def rebuild(self, site: Site, layer: LayerCall | None) -> Any | None:
        return None if layer is None else site.replay(layer, self.emit)

    # -- views ---------------------------------------------------------------------------------------

    def without_reshapes(self, view: Any) -> Any | None:
        """reshape(dense(reshape(x)))  -->  dense(x)   where only leading dimensions were merged and split again,
        dense(reshape(x)) where the first reshape did more than that."""
        site = self.site(view.args[0])
        if site is None or site.views or site.layer.conv is not None or site.layer.epilogue.residual:
            return None
        inner = self.lookup(site.layer.x)
        if inner is None or op_name(inner) not in VIEWS or op_name(inner) == "relax.permute_dims":
            return None
        x = inner.args[0]
        before, merged, out, after = (static_shape(e) or () for e in (x, site.layer.x, site.output, view))
        if not before or not after or not same_shape(after[-1:], out[-1:]):
            return None
        self.reads[x] += self.reads[site.layer.x] > 1  # the inner view lives on for its other readers
        rows = (*after[:-1], *merged[-1:])
        if not same_shape(before, rows):
            x = self.emit(relax.op.reshape(x, relax.ShapeExpr(list(rows))))
        return replace(site.layer, x=x).to_relax()

    def without_permutes(self, view: Any) -> Any | None:
        """permute_dims(permute_dims(x))  -->  x   where the second undoes the first;
        permute_dims(dense(x))  -->  dense(permute_dims(x))   where x is a permutation itself, up to a reshape."""
        first = self.lookup(view.args[0])
        if first is None:
            return None
        if op_name(first) != "relax.permute_dims":
            return self.permuted_before(view)
        inner, outer = permutation(first), permutation(view)
        if tuple(inner[axis] for axis in outer) != tuple(range(len(inner))):
            return None
        self.reads[first.args[0]] += self.reads[view.args[0]] > 1
        return first.args[0]

    def permuted_before(self, view: Any) -> Any | None:
        site, axes = self.site(view.args[0]), permutation(view)
        if site is None or site.views or site.layer.conv is not None or site.layer.epilogue.residual:
            return None
        source = self.lookup(site.layer.x)
        while op_name(source) == "relax.reshape":
            source = self.lookup(source.args[0])
        if axes[-1] != len(axes) - 1 or op_name(source) != "relax.permute_dims":
            return None
        rows = self.emit(relax.op.permute_dims(site.layer.x, list(axes)))
        return replace(site.layer, x=rows).to_relax()

    def permuted_after(self, layer: LayerCall) -> Any | None:
        """dense(permute_dims(x))  -->  permute_dims(dense(x))   where the rows change places: another permutation, or
        an attention, may follow and undo it."""
        source = self.lookup(layer.x)
        if layer.conv is not None or layer.epilogue.residual or op_name(source) != "relax.permute_dims":
            return None
        axes = permutation(source)
        if axes[-1] != len(axes) - 1 or self.reads[layer.x] != 1:
            return None
        return relax.op.permute_dims(self.emit(replace(layer, x=source.args[0]).to_relax()), list(axes))
