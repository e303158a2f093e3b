"""`relay.build` and `relay.build_module.create_executor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured import compiler, settings
from tvm_structured.errors import ModelError, TargetError
from tvm_structured.frontend import Imported, describe_input
from tvm_structured.guard import Note
from tvm_structured.planning import Plan, Requested
from tvm_structured.relay.backend import Executor, Runtime
from tvm_structured.relay.factory import GraphExecutorFactoryModule
from tvm_structured.relay.functions import reordered, with_inputs, with_main
from tvm_structured.relay.graph_executor import GraphModule, to_numpy
from tvm_structured.relay.tvm_names import make_target, read_target
from tvm_structured.structures import Unstructured
from tvm_structured.targets import resolve_target, warn_of_baseline

__all__ = ["build", "create_executor"]


def build(
    ir_mod: Any,
    target: Any = None,
    target_host: Any = None,
    executor: Any = None,
    runtime: Any = None,
    workspace_memory_pools: Any = None,
    constant_memory_pools: Any = None,
    params: Mapping[str, Any] | None = None,
    mod_name: str = "default",
) -> GraphExecutorFactoryModule:
    """Compile a Relax module with structured layers; the arguments are those of TVM 0.19's `relay.build`.

    ir_mod: what `relay.frontend` returns, or any Relax IRModule or function. params: weights by parameter name;
    parameters of `main` without a value stay inputs. target: as TVM takes it, also "llvm -mcpu=...", or "host"; without
    one, that of the enclosing `with target:`.

    The enclosing PassContext holds, as for any of TVM's pipelines: `instruments` see every pass, and `disabled_pass`
    leaves passes out by name ("RewriteLayers": all layers stay dense). At opt_level 0 no structure is searched for; a
    plan or budget is an explicit wish and holds all the same. These, and the database of `ts.tune`, come from
    `with ts.options(budget=..., plan=..., database=...)`, as does what int8 needs, on CPUs and on the accelerator
    (target="vta"): `ts.options(calibration=samples)`.

    Raises ModelError, TargetError, PlanError, BudgetError or VTAError.
    """
    from tvm.ir.transform import PassContext

    refuse_microcontrollers(executor, runtime, workspace_memory_pools or constant_memory_pools)
    options = settings.current()
    accelerator, target = compiler.split_target(read_target(target), options.vta_config)
    if accelerator is not None and target_host is not None:
        target, target_host = target_host, None  # what the accelerator leaves to the CPU
    target = settle_target(target, target_host)
    warn_of_baseline(target)
    imported = bind(ir_mod, params or {})
    wish = Wish.of(options)
    if accelerator is not None or options.calibration is not None or options.quantization is not None:
        samples, how = options.calibration, options.quantization
        int8 = compiler.int8_model(imported, samples, how, target, wish.budget, wish.plan)
        records = compiler.tuning_records(int8.mod, target, options.database)
        compiled = compiler.build_int8(int8, target, records, accelerator, options.vta_trials)
        return GraphExecutorFactoryModule(compiled, imported.params, target, mod_name)
    mod = compiler.canonicalize(imported, target)
    with PassContext():  # kernels built to be measured are no part of the pipeline that the user's context is about
        records = compiler.tuning_records(mod, target, options.database)
        plan = compiler.settle_plan(mod, target, wish.budget, wish.plan_for(mod), options.measure, records)
    compiled = compiler.build(mod, imported, plan, target, records)
    return GraphExecutorFactoryModule(compiled, imported.params, target, mod_name)


@dataclass(frozen=True)
class Wish:
    """What the options and the PassContext ask for. `dense`: why every layer stays dense, where that is so."""

    budget: Any
    plan: Any
    dense: str = ""

    @classmethod
    def of(cls, options: settings.Options) -> Wish:
        from tvm.ir.transform import PassContext

        context = PassContext.current()
        if "RewriteLayers" in map(str, context.disabled_pass):
            return cls(None, None, "RewriteLayers is disabled")
        if context.opt_level < 1 and options.budget is None and options.plan is None:
            return cls(None, None, "opt_level 0")
        return cls(options.budget, options.plan)

    def plan_for(self, mod: Any) -> Any:
        if not self.dense:
            return self.plan
        from tvm_structured.relay_passes.find_layers import find_layers

        names = list(find_layers(mod))
        return Plan(
            {name: Requested(Unstructured.name) for name in names}, {name: Note(0.0, self.dense) for name in names}
        )


def refuse_microcontrollers(executor: Any, runtime: Any, pools: Any) -> None:
    """Raises ModelError for an executor, runtime or memory pool that went with microTVM."""
    for given, kind in ((executor, Executor), (runtime, Runtime)):
        if given is not None and not isinstance(given, kind):
            kind(str(given))
    if pools:
        raise ModelError("memory pools: TVM removed microTVM after 0.19; leave workspace_memory_pools out")


def settle_target(target: Any, host: Any = None) -> Any:
    """The target, else that of the enclosing `with target:`. A list of one is that one."""
    from tvm.target import Target

    if isinstance(target, (list, tuple)) and len(target) == 1:
        target = target[0]
    target = Target.current(allow_none=True) if target is None else read_target(target)
    if target is None:
        raise TargetError('no target is given or entered; write relay.build(mod, target="host", params=params)')
    if host is not None:
        target = make_target(target, host)
    return resolve_target(target)


def bind(ir_mod: Any, params: Mapping[str, Any]) -> Imported:
    """The module with its inputs first, and the values of the weights: those given, else those that it carries."""
    from tvm import IRModule, relax
    from tvm.ir.transform import PassContext

    mod = IRModule({"main": ir_mod}) if isinstance(ir_mod, relax.Function) else ir_mod
    if not isinstance(mod, IRModule):
        raise ModelError(f"{type(ir_mod).__name__} is no module; give the first value that relay.frontend.* returns")
    if "main" not in [var.name_hint for var in mod.get_global_vars()]:
        raise ModelError("the module has no function 'main'; rename the entry function")
    main = mod["main"]
    variables = {var.name: var for var in main.params}
    unknown = [name for name in params if name not in variables]
    if unknown:
        raise ModelError(
            f"params has {unknown[0]!r} ({len(unknown)} such), which the module lacks; "
            f"its parameters are: {', '.join(variables) or 'none'}"
        )
    values = {name: as_parameter(variables[name], value) for name, value in {**attached(main), **params}.items()}
    inputs = [var for var in main.params if var.name not in values]
    weights = [var for var in main.params if var.name in values]
    mod = with_main(mod, with_inputs(reordered(main, [*inputs, *weights]), len(inputs)))
    if "CanonicalizeLayers" in map(str, PassContext.current().disabled_pass):
        mod, bound = relax.transform.BindParams("main", values)(mod), {}  # nobody else would bind them
    else:
        bound = values
    return Imported(mod, tuple(map(describe_input, inputs)), bound, {name: name for name in bound})


def attached(main: Any) -> dict[str, Any]:
    """The values that a frozen `main` carries for its weights."""
    attrs = main.attrs or {}
    if "params" not in attrs or "num_input" not in attrs:
        return {}
    weights = main.params[int(attrs["num_input"]) :]
    return {var.name: value for var, value in zip(weights, attrs["params"], strict=True)}


def as_parameter(var: Any, value: Any) -> np.ndarray:
    """A copy of the value (TVM, torch, numpy, list) as numpy, if it fits the parameter's declaration."""
    array = np.array(to_numpy(value))
    declared = describe_input(var)
    if not declared.accepts(array.shape):
        raise ModelError(f"params[{var.name!r}]: got shape {array.shape}, the module takes {declared}")
    if not np.can_cast(array.dtype, declared.dtype, "same_kind"):
        raise ModelError(f"params[{var.name!r}]: got {array.dtype}, the module takes {declared.dtype}; convert it")
    return array.astype(declared.dtype, copy=False)


def create_executor(
    kind: str = "graph",
    mod: Any = None,
    device: Any = None,
    target: Any = "host",
    params: Mapping[str, Any] | None = None,
) -> ModelExecutor:
    """`.evaluate()` of the result compiles, and returns a function of the inputs. Every kind runs on TVM's VM."""
    if kind not in ("graph", "vm", "debug", "aot"):
        raise ModelError(f"executor {kind!r} is unknown; use 'graph'")
    return ModelExecutor(mod, device, target, params)


@dataclass(frozen=True)
class ModelExecutor:
    """What `create_executor` returns."""

    mod: Any
    device: Any
    target: Any
    params: Mapping[str, Any] | None

    def evaluate(self) -> Callable[..., Any]:
        """Compile; the function takes the inputs in order or by name, and returns a tensor or a list of them."""
        import tvm

        lib = build(self.mod, self.target, params=self.params)
        module = GraphModule(lib["default"](self.device or tvm.cpu()))

        def run(*inputs: Any, **named: Any) -> Any:
            for position, value in enumerate(inputs):
                module.set_input(position, value)
            module.run(**named)
            outputs = [module.get_output(position) for position in range(module.get_num_outputs())]
            return outputs[0] if len(outputs) == 1 else outputs

        return run
