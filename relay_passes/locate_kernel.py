"""structured call, target  -->  the kernel that it would run on, and the place where; nothing is emitted."""

from __future__ import annotations

from typing import Any

from tvm_structured.schedules import Cpu
from tvm_structured.structures import Structure


def locate_kernel(call: Any, target: Any) -> tuple[Any, Structure, Any] | None:
    """(kernel, structure, site), or None where the target has no kernel for the call."""
    from tvm_structured.relay_passes.lower_structured import kernel_and_site

    if "cuda" not in target.keys:
        return kernel_and_site(call, Cpu.of(target))
    from tvm_structured.relay_passes.lower_on_gpu import kernel_and_gpu_site
    from tvm_structured.schedules.cuda import CUDA_KERNELS
    from tvm_structured.schedules.cuda.dense import MOST_ROWS
    from tvm_structured.schedules.gpu import Gpu

    if call.op not in CUDA_KERNELS:
        return None
    kernel, structure, site = kernel_and_gpu_site(call, Gpu.of(target))
    is_tvms = call.op == "dense" and isinstance(site.rows, int) and site.rows > MOST_ROWS
    return None if is_tvms else (kernel, structure, site)
