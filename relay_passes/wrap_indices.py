"""R.take(x, i, mode="fast")    -->  R.take(x, i, mode="wrap")
R.index_tensor(x, (i, ...))  -->  R.index_tensor(x, (where(i < 0, i + extent, i), ...))

Importers write the indexing of PyTorch and ONNX as it is, where -1 is the last element. TVM 0.27 reads in front of the
array then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured.dialect import constant
from tvm_structured.errors import ModelError
from tvm_structured.relay_passes.expressions import op_name, shape_of


@tvm.transform.module_pass(opt_level=0, name="WrapIndices")
class WrapIndices:
    """Indices that count from the end. Raises ModelError for one that does so along an axis of unknown extent."""

    def transform_module(self, mod: Any, _: Any) -> Any:
        wrapper = _Wrapper(mod)
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function):
                wrapper.builder_.update_func(var, wrapper.visit_expr(function))
        return wrapper.builder_.get()


@mutator
class _Wrapper(PyExprMutator):
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if op_name(call) == "relax.take" and call.attrs.mode == "fast":
            axis = None if call.attrs.axis is None else int(call.attrs.axis)
            return relax.op.take(call.args[0], call.args[1], axis, mode="wrap")
        if op_name(call) == "relax.index_tensor":
            data, indices = call.args
            indices = self.lookup_binding(indices) if isinstance(indices, relax.Var) else indices
            extents = shape_of(data)
            return relax.op.index_tensor(data, [self.positive(i, extents[k]) for k, i in enumerate(indices.fields)])
        return call

    def positive(self, index: Any, extent: Any) -> Any:
        """The index tensor along an axis, negative ones counted from its end."""
        dtype = str(index.ty.dtype)
        values = constant(index)
        if values is not None:
            if not (values < 0).any():
                return index
            if not isinstance(extent, int):
                raise ModelError(f"index {values.min()} counts from the end of an axis of unknown extent; fix its size")
            return relax.const(np.where(values < 0, values + extent, values), dtype)
        if not isinstance(extent, int):
            return index
        is_negative = self.builder_.emit(relax.op.less(index, relax.const(0, dtype)))
        from_end = self.builder_.emit(relax.op.add(index, relax.const(extent, dtype)))
        return self.builder_.emit(relax.op.where(is_negative, from_end, index))
