"""main(x) --> y   becomes   main(x) --> (x, lv0, lv1, ...), every float32 tensor of it; the attribute `observed` names
them. Used to calibrate; `tensor_names` is how other passes speak of the same tensors."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.expressions import is_float32


@tvm.transform.module_pass(opt_level=0, name="ObserveTensors")
class ObserveTensors:
    """All float32 tensors of known rank are results. Raises ModelError where there is no `main`."""

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        mod = relax.transform.ToNonDataflow()(mod)
        main = main_of(mod)
        names = tensor_names(main)
        body = relax.SeqExpr(main.body.blocks, relax.Tuple(list(names)))
        result = relax.TupleType([var.ty for var in names])
        function = relax.Function(main.params, body, result, main.is_pure, main.attrs)
        mod.update_func(mod.get_global_var("main"), function.with_attr("observed", list(names.values())))
        return mod


def tensor_names(function: Any) -> dict[Any, str]:
    """Variable -> a name that depends only on its place in the function, for float32 parameters and bindings."""
    bound = [binding.var for block in function.body.blocks for binding in block.bindings]
    variables = [*function.params, *bound]
    return {var: f"{index}:{var.name}" for index, var in enumerate(variables) if is_tensor(var)}


def is_tensor(var: Any) -> bool:
    return isinstance(var.ty, relax.TensorType) and is_float32(var)
