"""What a layer costs on a GPU in a given form: measured on the one here, or assumed from a usual card's roofline."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tvm_structured.dialect import LayerCall
from tvm_structured.lone_layer import alone
from tvm_structured.schedules.cuda import CUDA_KERNELS
from tvm_structured.schedules.gpu import Gpu
from tvm_structured.structures import Structure

COPIES = 8  # of the layer in one module, so that the call of the module hardly counts
ROUNDS = 7
USUAL_L2 = 50 * 1024 * 1024  # bytes, where the driver does not tell
LAUNCH = 2.5e-6  # seconds for a kernel that does nothing, within a stream of others
# operations a second of a multiprocessor in a large product, on tensor cores and on ordinary ones
HALF_FLOPS, FLOAT_FLOPS = 5.8e12, 0.39e12
BANDWIDTH = {70: 0.8e12, 75: 0.3e12, 80: 1.4e12, 86: 0.8e12, 89: 0.9e12, 90: 2.6e12, 100: 6e12}  # bytes a second
# shares of that which kernels of a form reach with 512 rows, as docs/benchmarks_gpu.md has them, and their launches
HALF_EFFICIENCY = {
    "dense": 0.32,
    "block_circulant": 0.13,
    "permuted_diagonal": 0.13,
    "low_rank": 0.14,
    "tensor_train": 0.07,
    "winograd": 0.05,
}
FLOAT_EFFICIENCY = {"dense": 0.3, "winograd": 0.1}
USUAL_HALF, USUAL_FLOAT = 0.1, 0.42  # of the other forms
LAUNCHES = {"low_rank": 2, "tensor_train": 4, "winograd": 3}


def predict_on_gpu(call: LayerCall, structure: Structure, gpu: Gpu) -> float:
    """Seconds: launches, then the slower of operations and bytes. Forms without a kernel cost what dense does."""
    rows, size = call.num_rows(), 2 if str(call.x.ty.dtype) in ("float16", "bfloat16") else 4
    has_kernel = structure.name in CUDA_KERNELS
    out, inner = structure.shape
    flops = structure.flops(rows) if has_kernel else 2 * rows * out * inner
    params = structure.num_params if has_kernel else out * inner
    if gpu.has_tensor_cores(str(call.x.ty.dtype)):
        rate = HALF_FLOPS * HALF_EFFICIENCY.get(structure.name, USUAL_HALF)
    else:
        rate = FLOAT_FLOPS * FLOAT_EFFICIENCY.get(structure.name, USUAL_FLOAT)
    moved = size * (params + rows * (out + inner))
    bandwidth = BANDWIDTH[max((c for c in BANDWIDTH if c <= gpu.capability), default=70)]
    work = max(flops / (gpu.multiprocessors * rate), moved / bandwidth)
    return LAUNCH * (LAUNCHES.get(structure.name, 1) if has_kernel else 1) + work


def measure_on_gpu(calls: Sequence[LayerCall], target: Any, is_cold: bool = False, records: Any = None) -> list[float]:
    """Seconds of each call on the GPU here, compiled alone, taken in turns; the lower quartile counts.

    Cold: the weights do not stay in the card's L2 from run to run.
    """
    import tvm
    from tvm.runtime.vm import VirtualMachine

    from tvm_structured.gpu_build import device_code
    from tvm_structured.relay_passes.pipeline import structured_pipeline

    device, rng = tvm.cuda(0), np.random.default_rng(0)
    runs = []
    for call in calls:
        mod, shapes = alone(call, COPIES)
        with target, device_code(target, cuda_graph=False):
            lowered = structured_pipeline({}, target, records)(mod)
            executable = tvm.compile(lowered, target, relax_pipeline="default_build")
        machine = VirtualMachine(executable, device)
        arrays = [on_device(rng.standard_normal(shape), str(call.x.ty.dtype), device) for shape in shapes]
        runs.append((machine["main"], machine.time_evaluator("main", device, number=10), arrays))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for taken, (main, timer, arrays) in zip(times, runs, strict=True):
            hot = float(timer(*arrays).mean) / COPIES
            taken.append(hot + (reading_seconds(main, arrays, device) if is_cold else 0.0))
    return [float(np.quantile(taken, 0.25)) for taken in times]


def reading_seconds(main: Callable[..., Any], arrays: Sequence[Any], device: Any) -> float:
    """How much longer a run takes whose weights come from memory; the copies share them, the first one reads them."""

    def once(prepare: Callable[[], None]) -> float:
        prepare()
        device.sync()
        start = time.perf_counter()
        main(*arrays)
        device.sync()
        return time.perf_counter() - start

    once(lambda: None)
    return max(0.0, once(evictor(device)) - once(lambda: None))


@functools.cache
def evictor(device: Any) -> Callable[[], None]:
    """Writes twice the card's L2."""
    import tvm

    size = 2 * int(device.l2_cache_size_bytes or USUAL_L2)
    source, target = (tvm.runtime.empty((size,), "int8", device) for _ in range(2))

    def evict() -> None:
        source.copyto(target)

    return evict


def on_device(values: np.ndarray, dtype: str, device: Any) -> Any:
    """Numbers as a tensor of a type on a device."""
    import tvm

    from tvm_structured.schedules.cuda.functions import numpy_type

    return tvm.runtime.tensor(values.astype(numpy_type(dtype)), device)
