"""compile(): the whole road from a model to a compiled module."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from tvm_structured.errors import ModelError, PlanError, StructuredError
from tvm_structured.frontend import Imported, first_line, import_model
from tvm_structured.module import FORMAT, METADATA, Compiled
from tvm_structured.planning import Plan, make_plan
from tvm_structured.progress import stage
from tvm_structured.report import make_report
from tvm_structured.structures import Layer, Structure
from tvm_structured.targets import resolve_target


def compile(
    model: Any,
    inputs: Any = None,
    target: Any = "llvm",
    budget: Any = None,
    plan: Any = None,
    database: Any = None,
    measure: bool = True,
) -> Compiled:
    """Compile a model with structured layers.

    model: torch.nn.Module, torch.export.ExportedProgram, ONNX path or ModelProto, or a Relax IRModule.
    inputs: example arrays, a tuple (needed for a torch.nn.Module). target: what TVM takes, or "host".
    budget: `Budget` or a fraction of the parameters; without one the result equals the dense model.
    plan: `Plan` or the path of a saved one, instead of a budget. database: a MetaSchedule database object, whose
    records are used for the functions that have no structured kernel.
    measure: time candidates on this machine once (kept in a file, see `tvm-structured costs`) and use only
    what beats the dense layer; False, and targets that do not run here, predict instead.

    Raises ModelError, TargetError, PlanError or BudgetError.
    """
    target = resolve_target(target)
    imported = import_model(model, inputs)
    mod = canonicalize(imported, target)
    plan = settle_plan(mod, target, budget, plan, measure)
    return build(mod, imported, plan, target, database)


def canonicalize(imported: Imported, target: Any = None) -> Any:
    """The imported module in the canonical spelling, weights as constants; images laid out for the target."""
    from tvm_structured.relay_passes.pipeline import canonical_pipeline

    return canonical_pipeline(imported.params, imported.names, target)(imported.mod)


def settle_plan(mod: Any, target: Any, budget: Any = None, plan: Any = None, measure: bool = True) -> Plan:
    """The plan for a canonical module: the one given, made concrete, or a new one, guarded by costs."""
    from tvm_structured.cost_store import CostStore
    from tvm_structured.costs import Prices
    from tvm_structured.detection_store import DetectionStore
    from tvm_structured.relay_passes.find_layers import find_calls, find_layers, find_structures

    layers: dict[str, Layer] = find_layers(mod)
    given: dict[str, Structure] = find_structures(mod)
    if plan is None:
        if budget is not None and not layers:
            raise ModelError(
                "a budget was given, but the model has no layer with a constant float32 weight to apply it to"
            )
        prices = Prices(find_calls(mod), target, CostStore(), measure)
        return make_plan(layers, budget, prices, DetectionStore()).with_given(given)
    if budget is not None:
        raise ModelError("give a plan or a budget, not both: the plan already says what every layer becomes")
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a ts.Plan or the path of a saved one, got {type(plan).__name__} {plan!r}")
    return plan.without(given).resolve(layers).with_given(given)


def build(mod: Any, imported: Imported, plan: Plan, target: Any, database: Any) -> Compiled:
    """Rewrite by plan, schedule and compile."""
    import tvm

    from tvm_structured.relay_passes.find_layers import find_calls, find_layers
    from tvm_structured.relay_passes.mark_layers import kernel_calls
    from tvm_structured.relay_passes.pipeline import structured_pipeline

    report = make_report(find_calls(mod), plan, target.attrs.get("mcpu", target.kind.name))
    metadata = {
        "format": FORMAT,
        "target": str(target.attrs.get("mcpu", target.kind.name)),
        "inputs": [spec.to_json() for spec in imported.inputs],
        "report": report.to_dict(),
    }
    choices = {name: plan.choices[name] for name in find_layers(mod)}
    try:
        with target, stage("Compiling"):
            lowered = structured_pipeline(choices, target, database)(mod)
            metadata["kernels"] = kernel_calls(lowered)
            executable = tvm.compile(with_metadata(lowered, metadata), target, relax_pipeline="default_build")
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # what TVM's C++ checks raise
        if isinstance(error, StructuredError):
            raise
        raise ModelError(f"TVM cannot compile this model for {target}: {first_line(error)}") from error
    return Compiled(executable, metadata, plan, lowered)


def with_metadata(mod: Any, metadata: dict[str, Any]) -> Any:
    """The module with one more function, which returns the metadata."""
    from tvm import relax

    raw = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8)
    builder = relax.BlockBuilder(mod)
    with builder.function(METADATA, []):
        builder.emit_func_output(relax.const(raw))
    return builder.get()
