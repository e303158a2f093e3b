"""compile(): the whole road from a model to a compiled module."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_structured.calibration import Quantization, calibrate
from tvm_structured.errors import ModelError, PlanError, StructuredError, TargetError
from tvm_structured.frontend import Imported, first_line, import_model
from tvm_structured.gpu_build import device_code, emulation
from tvm_structured.module import FORMAT, METADATA, Compiled
from tvm_structured.planning import Plan, make_plan
from tvm_structured.progress import stage
from tvm_structured.report import Report, make_report
from tvm_structured.structures import Layer, Structure, Unstructured
from tvm_structured.targets import is_cuda, resolve_target, target_name, warn_of_baseline

if TYPE_CHECKING:
    from tvm_structured.vta import VTAConfig
    from tvm_structured.vta.programs import Programs


def compile(
    model: Any,
    inputs: Any = None,
    target: Any = "host",
    budget: Any = None,
    plan: Any = None,
    database: Any = None,
    measure: bool = True,
    calibration: Any = None,
    quantization: Quantization | None = None,
    cuda_graph: bool = True,
    vta_config: Any = None,
    vta_trials: int = 0,
) -> Compiled:
    """Compile a model with structured layers.

    model: torch.nn.Module, torch.export.ExportedProgram, ONNX path or ModelProto, or a Relax IRModule.
    inputs: example arrays, a tuple (needed for a torch.nn.Module). target: "host", this machine; what TVM takes
    for CPUs and CUDA; or "vta": the accelerator, simulated on this machine (or on "host" of
    {"kind": "vta", "host": target}).
    {"kind": "cuda", "arch": "sm_90"} needs no GPU, see `Compiled.emulate` and `Compiled.export`.
    budget: `Budget` or a fraction of the parameters; without one the result equals the dense model.
    plan: `Plan` or the path of a saved one, instead of a budget. database: what `ts.tune` made, as its directory or a
    `ts.Database`: tuned kernels are used, and priced as such. A MetaSchedule database object is taken for the functions
    that have no structured kernel.
    measure: time candidates on this machine once (kept in a file, see `tvm-structured costs`) and use only
    what beats the dense layer; False, and targets that do not run here, predict instead.
    calibration: sample inputs; with them, or with `quantization` (how, see `Quantization`), layers compute in int8 and
    the result is near the model's only, see `quantize`. The accelerator always computes in int8.
    cuda_graph: on a GPU, launch the kernels between inputs of known shapes as one CUDA graph.
    vta_config: the accelerator's parameters, a `VTAConfig`, or the keys of VTA's JSON files as a dict, text or path.
    vta_trials: schedules to try for every program of the accelerator, by modelled cycles; 0: the default ones.

    Raises ModelError, TargetError, PlanError, BudgetError, DatabaseError, or VTAError for a configuration.
    """
    accelerator, target = split_target(target, vta_config)
    target = resolve_target(target)
    warn_of_baseline(target)
    imported = import_model(model, inputs)
    if accelerator is not None or calibration is not None or quantization is not None:
        samples = inputs if calibration is None else calibration
        int8 = int8_model(imported, samples, quantization, target, budget, plan)
        return build_int8(int8, target, tuning_records(int8.mod, target, database), accelerator, vta_trials)
    mod = canonicalize(imported, target)
    records = tuning_records(mod, target, database)
    plan = settle_plan(mod, target, budget, plan, measure, records)
    return build(mod, imported, plan, target, records, cuda_graph)


def quantize(
    model: Any,
    inputs: Any = None,
    calibration: Any = None,
    quantization: Quantization | None = None,
    budget: Any = None,
    plan: Any = None,
) -> Any:
    """The model in int8 as a Relax module of plain integer operators, for `compile` with any target.

    calibration: sample inputs on which the ranges of activations are observed: an array of samples, a tuple or dict of
    them for several inputs, or an iterable of batches (such as a DataLoader; labels behind the inputs are left out);
    the example inputs, if left out. Activations are symmetric int8, weights int8 with a scale for each channel; what
    has no integer form stays float32. The other arguments are those of `compile`; structures are chosen by numbers of
    operations. The result's `main` takes and returns float32.

    Raises ModelError, PlanError or BudgetError.
    """
    imported = import_model(model, inputs)
    samples = inputs if calibration is None else calibration
    return int8_model(imported, samples, quantization, resolve_target("host"), budget, plan).mod


@dataclass(frozen=True, eq=False)
class Int8Model:
    """A quantized module, and what its layers were before."""

    mod: Any
    imported: Imported
    plan: Plan
    report: Report


def int8_model(
    imported: Imported, samples: Any, options: Quantization | None, target: Any, budget: Any, plan: Any
) -> Int8Model:
    """Canonical module, plan, structured layers split into parts, ranges, integers; a quantized module as it is."""
    from tvm_structured.quantized import is_quantized
    from tvm_structured.relay_passes.find_layers import find_calls, find_layers
    from tvm_structured.relay_passes.quantize import Quantize
    from tvm_structured.relay_passes.rewrite_layers import RewriteLayers
    from tvm_structured.relay_passes.split_layers import SplitLayers

    options = Quantization() if options is None else options
    mod = canonicalize(imported)
    plan = settle_plan(mod, None, budget, plan).without_algorithms(find_layers(mod))
    report = make_report(find_calls(mod), plan, "int8")
    if is_quantized(mod):
        return Int8Model(mod, imported, plan, report)
    if samples is None:
        raise ModelError("quantization needs samples of the model's inputs: give calibration=array (or example inputs)")
    mod = RewriteLayers({name: plan.choices[name] for name in find_layers(mod)})(mod)
    mod = SplitLayers()(mod)
    ranges = calibrate(mod, imported.inputs, samples, options, resolve_target("host") if is_cuda(target) else target)
    return Int8Model(Quantize(ranges, options.kept(list(find_calls(mod))))(mod), imported, plan, report)


def split_target(target: Any, vta_config: Any = None) -> tuple[VTAConfig | None, Any]:
    """The accelerator's configuration, None for another target; and the target of what runs on the CPU.

    Raises TargetError for a configuration without the accelerator, VTAError for one that is none.
    """
    kind = target.get("kind") if isinstance(target, Mapping) else target
    if kind != "vta":
        if vta_config is not None:
            raise TargetError(f'vta_config is given, but the target is {target!r}; use target="vta"')
        return None, target
    from tvm_structured.vta import VTAConfig

    return VTAConfig.read(vta_config), target.get("host", "host") if isinstance(target, Mapping) else "host"


def canonicalize(imported: Imported, target: Any = None) -> Any:
    """The imported module in the canonical spelling, weights as constants; images laid out for the target."""
    from tvm_structured.relay_passes.pipeline import canonical_pipeline

    return canonical_pipeline(imported.params, imported.names, target)(imported.mod)


def tuning_records(mod: Any, target: Any, database: Any) -> Any:
    """What a database has for a canonical module on a target; None without one. Raises DatabaseError."""
    if database is None:
        return None
    from tvm_structured.costs import weights_are_cold
    from tvm_structured.relay_passes.find_layers import find_calls
    from tvm_structured.tuning.lookup import records_for

    return records_for(database, target, weights_are_cold(find_calls(mod)))


def settle_plan(
    mod: Any,
    target: Any,
    budget: Any = None,
    plan: Any = None,
    measure: bool = True,
    records: Any = None,
    store: Any = None,
) -> Plan:
    """The plan for a canonical module: the one given, made concrete, or a new one, guarded by costs on the target;
    without a target by numbers of operations."""
    from tvm_structured.cost_store import CostStore
    from tvm_structured.costs import Prices
    from tvm_structured.detection_store import DetectionStore
    from tvm_structured.relay_passes.find_layers import find_calls, find_layers, find_structures

    layers: dict[str, Layer] = find_layers(mod)
    given: dict[str, Structure] = find_structures(mod)
    calls = find_calls(mod)

    def expanded(name: str) -> Layer:
        return calls[name][0].expanded().to_layer()

    if plan is None:
        if budget is not None and not layers:
            raise ModelError(
                "a budget was given, but the model has no layer with a constant float32 weight to apply it to"
            )
        prices = None if target is None else Prices(calls, target, store or CostStore(), measure, records)
        return make_plan(layers, budget, prices, DetectionStore()).with_given(given, expanded, prices)
    if budget is not None:
        raise ModelError("give a plan or a budget, not both: the plan already says what every layer becomes")
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a ts.Plan or the path of a saved one, got {type(plan).__name__} {plan!r}")
    dense = [name for name in given if name in plan.choices and plan.choices[name].name == Unstructured.name]
    return plan.without(given).resolve(layers).with_given(given).expanding(dense, expanded)


def build(
    mod: Any, imported: Imported, plan: Plan, target: Any, records: Any = None, cuda_graph: bool = True
) -> Compiled:
    """Rewrite by plan, schedule and compile."""
    from tvm_structured.relay_passes.find_layers import find_calls

    report = make_report(find_calls(mod), plan, target_name(target))
    choices = {name: plan.choices[name] for name in find_calls(mod)}
    return assemble(mod, choices, imported, plan, report, target, records, cuda_graph)


def build_int8(
    model: Int8Model, target: Any, records: Any, accelerator: VTAConfig | None = None, trials: int = 0
) -> Compiled:
    """Schedule and compile a quantized module; its layers are what they shall be."""
    mod, programs = model.mod, None
    if accelerator is not None:
        from tvm_structured.relay_passes.gather_patches import GatherPatches
        from tvm_structured.relay_passes.offload_vta import OffloadVta
        from tvm_structured.vta.programs import Programs

        offload = OffloadVta(accelerator, target, trials)
        with stage("Lowering to the accelerator"):
            mod = offload(GatherPatches(accelerator)(mod))
        programs = Programs(accelerator, tuple(offload.placements)) if offload.placements else None
    return assemble(mod, {}, model.imported, model.plan, model.report, target, records, programs=programs)


def assemble(
    mod: Any,
    choices: Mapping[str, Structure],
    imported: Imported,
    plan: Plan,
    report: Report,
    target: Any,
    records: Any,
    cuda_graph: bool = True,
    programs: Programs | None = None,
) -> Compiled:
    """Rewrite by the choices, lower, schedule and compile, with a description inside."""
    import tvm

    from tvm_structured.relay_passes.mark_layers import kernel_calls
    from tvm_structured.relay_passes.pipeline import structured_pipeline

    metadata = {
        "format": FORMAT,
        "target": target_name(target),
        "device": "cuda" if is_cuda(target) else "cpu",
        "inputs": [spec.to_json() for spec in imported.inputs],
        "report": report.to_dict(),
    }
    if programs is not None:
        metadata["vta"] = programs.describe()
    try:
        with target, stage("Compiling"), device_code(target, cuda_graph):
            lowered = structured_pipeline(choices, target, records)(mod)
            metadata["kernels"] = kernel_calls(lowered)
            executable = tvm.compile(with_metadata(lowered, metadata), target, relax_pipeline="default_build")
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # what TVM's C++ checks raise
        if isinstance(error, StructuredError):
            raise
        raise ModelError(f"TVM cannot compile this model for {target}: {first_line(error)}") from error
    emulator = functools.partial(emulation, mod, choices, target, metadata) if is_cuda(target) else None
    return Compiled(executable, metadata, plan, lowered, emulator, programs)


def with_metadata(mod: Any, metadata: dict[str, Any]) -> Any:
    """The module with one more function, which returns the metadata."""
    from tvm import relax

    raw = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8)
    builder = relax.BlockBuilder(mod)
    with builder.function(METADATA, []):
        builder.emit_func_output(relax.const(raw))
    return builder.get()
