"""What a layer costs in a given form: measured on this machine once, or predicted from operations and bytes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.cost_store import CostStore
from tvm_structured.devices import compute_capability, has_gpu
from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.gpu_costs import measure_on_gpu, predict_on_gpu
from tvm_structured.guard import Cost
from tvm_structured.lone_layer import alone, concrete
from tvm_structured.schedules.gpu import Gpu
from tvm_structured.structures import Structure
from tvm_structured.targets import host_cpu, is_cuda
from tvm_structured.timing import last_level_cache, seconds_in_turns

METHOD = 3  # of measuring: costs that were taken in another way are not comparable
PEAK_FLOPS = 100e9  # a core of a server CPU with AVX-512, for predictions: only ratios matter
BANDWIDTH = 25e9  # bytes a second
# share of PEAK_FLOPS that the kernels reach, roughly; see docs/benchmarks.md for how they are measured
EFFICIENCY = {"dense": 0.8, "winograd": 0.6, "block_circulant": 0.45, "permuted_diagonal": 0.3, "tensor_train": 0.5}


@dataclass
class Prices:
    """Prices layers of one module on one target. `calls`: layer name -> its calls in the canonical module."""

    calls: Mapping[str, Sequence[LayerCall]]
    target: Any
    store: CostStore
    measure: bool = True
    records: Any = None  # `tuning.Records`: a layer is priced in the configuration that it will be compiled in

    @functools.cached_property
    def is_cold(self) -> bool:
        return weights_are_cold(self.calls)

    def __call__(self, name: str, structures: Sequence[Structure]) -> list[Cost]:
        """Seconds for all uses of the layer in one run of the model, in each of the forms."""
        uses = [self.price([with_structure(call, s) for s in structures], structures) for call in self.calls[name]]
        is_measured = all(measured for _, measured in uses)
        guess = "assumed" if is_cuda(self.target) else "predicted"  # of a GPU only the arch is known
        return [Cost(sum(each), is_measured, guess) for each in zip(*(seconds for seconds, _ in uses), strict=True)]

    def price(self, calls: Sequence[LayerCall], structures: Sequence[Structure]) -> tuple[list[float], bool]:
        """(seconds of one call in each form, whether they were measured). Where one is not known all are measured, in
        turns; for a target that does not run here those of a tuning database count, if it has all of them."""
        pairs = list(zip(calls, structures, strict=True))
        if not self.measure:
            return self.predicted(pairs), False
        if not runs_here(self.target):
            recorded = [recorded_seconds(call, self.target, self.records) for call in calls]
            known = [seconds for seconds in recorded if seconds is not None]
            return (known, True) if len(known) == len(calls) else (self.predicted(pairs), False)
        keys = [cost_key(call, s, self.target, self.is_cold, self.records) for call, s in pairs]
        stored = {} if self.records is None else getattr(self.records, "costs", {})
        known = [stored.get(key) or self.store.get(key) for key, _ in keys]
        if any(seconds is None for seconds in known):
            measure = measure_on_gpu if is_cuda(self.target) else measure_calls
            known = measure(calls, self.target, self.is_cold, self.records)
            for (key, what), seconds in zip(keys, known, strict=True):
                self.store.put(key, seconds, what)
        return known, True

    def predicted(self, pairs: Sequence[tuple[LayerCall, Structure]]) -> list[float]:
        if is_cuda(self.target):
            gpu = Gpu.of(self.target)
            return [predict_on_gpu(call, structure, gpu) for call, structure in pairs]
        cores = int(self.target.attrs["num-cores"])
        return [predict(call, structure, cores) for call, structure in pairs]


def weights_are_cold(calls: Mapping[str, Sequence[LayerCall]]) -> bool:
    """Whether the weights of a module do not stay in cache from run to run."""
    factors = [factor for uses in calls.values() for factor in uses[0].factors]
    return sum(4 * int(np.prod(static_shape(factor))) for factor in factors) > last_level_cache()


def recorded_seconds(call: LayerCall, target: Any, records: Any) -> float | None:
    """What a tuning database says of a layer that is one kernel; None where it says nothing."""
    from tvm_structured.relay_passes.locate_kernel import locate_kernel

    place = locate_kernel(call, target) if hasattr(records, "seconds") else None
    if place is None or (call.conv is not None and place[2].conv is None):  # a product between two other kernels
        return None
    seconds: float | None = records.seconds(*place)
    return seconds


def runs_here(target: Any) -> bool:
    """Whether code for the target runs on this machine as it would on its own: this CPU or one whose features it has,
    a GPU of the same compute capability."""
    from tvm.target import Target, codegen

    if is_cuda(target):
        return has_gpu() and compute_capability() == Gpu.of(target).capability
    if "mtriple" in target.attrs and str(target.attrs["mtriple"]).partition("-")[0] != host_architecture():
        return False
    host = Target({"kind": "llvm", "mcpu": host_cpu()})
    vector = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma", "avx")
    return all(codegen.target_has_features(f, host) for f in vector if codegen.target_has_features(f, target))


def host_architecture() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_triple()).partition("-")[0]


def with_structure(call: LayerCall, structure: Structure) -> LayerCall:
    """The call, with the layer in another form."""
    from tvm import relax

    if structure.name == "dense":
        return call.expanded()
    factors = tuple(relax.const(np.ascontiguousarray(factor)) for factor in structure.factors.values())
    return replace(call, op=structure.name, sizes=structure.sizes_of, factors=factors)


def predict(call: LayerCall, structure: Structure, cores: int) -> float:
    """Roofline: the slower of the operations at the kernel's usual efficiency and the bytes of factors, x and y."""
    rows = call.num_rows()
    peak = PEAK_FLOPS * cores * EFFICIENCY.get(structure.name, 0.5)
    moved = structure.num_bytes + 4 * rows * sum(structure.shape)
    return max(structure.flops(rows) / peak, moved / BANDWIDTH)


def cost_key(call: LayerCall, structure: Structure, target: Any, is_cold: bool, records: Any = None) -> tuple[str, str]:
    """(key, description). The key covers form, shapes, index factors, epilogue, caches, target, versions and, where
    tuning found a better one than the hand schedule, the kernel's configuration."""
    import tvm

    indices = {
        name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        for name, array in structure.factors.items()
        if name not in structure.trainable_factors
    }
    described = {
        "method": METHOD,
        "op": call.op,
        "sizes": call.sizes,
        "factors": {name: list(array.shape) for name, array in structure.factors.items()},
        "indices": indices,
        "x": concrete(call.x),
        "dtype": str(call.x.ty.dtype),
        "epilogue": repr(call.epilogue),
        "conv": repr(call.conv),
        "out_block": call.out_block,
        "is_cold": is_cold,
        "target": str(target),
        "tvm": tvm.__version__,
        "kernels": kernel_version(),
    }
    config = tuned_config(call, target, records)
    if config is not None:
        described["config"] = config
    key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return key, f"{call.op} {structure.describe()} {call.describe()} x{list(concrete(call.x))}".replace("  ", " ")


def tuned_config(call: LayerCall, target: Any, records: Any) -> Any | None:
    """The configuration that tuning found for the call's kernel, None where it is the hand schedule."""
    from tvm_structured.relay_passes.locate_kernel import locate_kernel

    place = locate_kernel(call, target) if hasattr(records, "tuned") else None
    return None if place is None else records.tuned(*place)


@functools.cache
def kernel_version() -> str:
    """A digest of all kernel sources: a changed kernel is measured anew."""
    from tvm_structured import relay_passes, schedules

    digest = hashlib.sha256()
    for package in (schedules, relay_passes):
        for source in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def measure_calls(calls: Sequence[LayerCall], target: Any, is_cold: bool = False, records: Any = None) -> list[float]:
    """Seconds of each call, compiled alone. Cold: its weights come from memory."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    from tvm_structured.relay_passes.pipeline import structured_pipeline
    from tvm_structured.targets import use_all_cores

    use_all_cores()
    rng = np.random.default_rng(0)
    machines, inputs = [], []
    for call in calls:
        mod, shapes = alone(call)
        with target:
            executable = tvm.compile(
                structured_pipeline({}, target, records)(mod), target, relax_pipeline="default_build"
            )
        machines.append(VirtualMachine(executable, tvm.cpu()))
        inputs.append([rng.standard_normal(shape).astype(np.float32) for shape in shapes])
    return seconds_in_turns(machines, inputs, is_cold)
