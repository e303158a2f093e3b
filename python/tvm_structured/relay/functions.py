"""The parameters of a Relax function: renamed, reordered, told apart into inputs and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def renamed(function: Any, names: Sequence[str]) -> Any:
    """The function with other names for its parameters, in order."""
    from tvm import relax

    fresh = [relax.Var(name, var.ty) for name, var in zip(names, function.params, strict=True)]
    bound = function.bind_params(dict(zip(function.params, fresh, strict=True)))
    return relax.Function(fresh, bound.body, bound.ret_ty, bound.is_pure, attrs=function.attrs)


def reordered(function: Any, params: Sequence[Any]) -> Any:
    """The function with the same parameters in another order."""
    from tvm import relax

    return relax.Function(list(params), function.body, function.ret_ty, function.is_pure, attrs=function.attrs)


def with_inputs(function: Any, count: int, values: Sequence[Any] | None = None) -> Any:
    """The function marked as TVM's importers do: its first `count` parameters are inputs, `values` are the others'."""
    function = function.without_attr("params").with_attr("num_input", count)
    return function if values is None else function.with_attr("params", list(values))


def with_main(mod: Any, function: Any) -> Any:
    """The module with another `main`; the one given stays as it is."""
    import tvm

    changed = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    changed.update_func(changed.get_global_var("main"), function)
    return changed
