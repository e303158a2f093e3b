"""matmul(softmax(scale * matmul(q, k^T) + bias), v)  -->  call_tir(attention, q, k, v, bias)

The kernel reads heads where a projection left them and writes them where the next one wants them, so that the
reshapes and permutations around an attention vanish with it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from tvm_structured.dialect import static_shape
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.expressions import count_uses, op_name, same_shape
from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.match_attention import AttentionMatcher, Match
from tvm_structured.relay_passes.strided_views import MOVES, Digit, View, is_one, merge, view_of, whole
from tvm_structured.schedules.attention import Attention, attention_func
from tvm_structured.schedules.cpu import Cpu


@dataclass(frozen=True, eq=False)
class Replacement:
    """The kernel that gives the value of a variable, up to a reshape."""

    attention: Attention
    operands: tuple[Any, ...]


@tvm.transform.module_pass(opt_level=0, name="FuseAttention")
class FuseAttention:
    """Attentions of `main`, for the CPU of the enclosing `with target:`."""

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        target = Target.current(allow_none=True)
        if target is None or "cpu" not in target.keys:
            return mod
        function = main_of(mod)
        replacements = find_attentions(mod, function)
        return _Fuser(mod, replacements, Cpu.of(target)).run(function) if replacements else mod


def find_attentions(mod: Any, function: Any) -> dict[Any, Replacement]:
    """Variable -> the kernel that computes it."""
    weights, uses = WeightFolder(mod, function), count_uses(function)
    matcher = AttentionMatcher(weights, uses)
    matches = [match for var, call in weights.bindings.items() if (match := matcher.match(var, call)) is not None]
    if not matches:
        return {}
    readers: dict[Any, Any] = {}
    for var, value in weights.bindings.items():
        argument = value if isinstance(value, relax.Var) else value.args[0] if op_name(value) in MOVES else None
        if isinstance(argument, relax.Var):
            readers[argument] = var
    return dict(settle(match, readers, uses, weights) for match in matches)


def settle(match: Match, readers: Any, uses: Any, weights: Any) -> tuple[Any, Replacement]:
    """The last variable that only moves the result's elements, into an order in which the kernel can write them."""
    a = match.attention
    place, order, var = match.result, (0, 2, 1, 3), match.result
    while uses[var] == 1 and var in readers:
        var = readers[var]
        found = order_of(a, match.result, view_of(var, weights))
        if found is not None:
            place, order = var, found
    return place, Replacement(replace(a, order=order), match.operands)


def order_of(a: Attention, result: Any, view: Any) -> tuple[int, ...] | None:
    """The order of (batch, query, head, feature) in which a view of the result lies contiguously."""
    if view is None or not view.source.same_as(result) or view.scale != 1.0:
        return None
    heads_first = whole(result, (a.batch, a.heads, a.queries, a.width)).permuted((0, 2, 1, 3))
    for order in itertools.permutations(range(3)):
        written = heads_first.permuted((*order, 3)).reshaped(view.shape)
        if written is not None and same_places(written, view):
            return (*order, 3)
    return None


def same_places(a: View, b: View) -> bool:
    """Whether two views of one shape hold the same elements in the same places."""
    one, other = steps(a), steps(b)
    return len(one) == len(other) and all(same_shape(x, y) for x, y in zip(one, other, strict=True))


def steps(view: View) -> list[Digit]:
    """The digits of a view, those merged that follow one another in memory."""
    found: list[Digit] = []
    for digit in (digit for axis in view.axes for digit in axis if not is_one(digit[0])):
        merged = merge((found[-1], digit)) if found else None
        if merged is not None:
            found.pop()
        found.append(merged or digit)
    return found


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, replacements: dict[Any, Replacement], cpu: Cpu) -> None:
        super().__init__(mod)
        self.mod, self.replacements, self.cpu = mod, replacements, cpu

    def run(self, function: Any) -> Any:
        rewritten = relax.analysis.remove_all_unused(self.visit_expr(function))
        self.builder_.update_func(self.mod.get_global_var("main"), rewritten)
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        replacement = self.replacements.get(binding.var)
        if replacement is None:
            super().visit_var_binding_(binding)
            return
        value = self.kernel_call(replacement, static_shape(binding.var))
        is_inner = isinstance(binding.var, relax.DataflowVar)
        new = self.builder_.emit(value) if is_inner else self.builder_.emit_output(value)
        self.set_var_remap(binding.var, new)

    def kernel_call(self, replacement: Replacement, shape: Any) -> Any:
        a = replacement.attention
        func = self.builder_.add_func(attention_func(a, self.cpu), "attention")
        operands = [self.visit_expr(operand) for operand in replacement.operands]
        call = relax.call_tir(func, operands, relax.TensorType(a.y_shape, "float32"))
        return call if same_shape(a.y_shape, shape) else relax.op.reshape(self.builder_.emit(call), shape)
