"""CUDA kernels: CUDA_KERNELS is the table; the key is the structure's name.

The protocol is that of `schedules.base.Kernel` with a `GpuSite`. Every PrimFunc is scheduled s_tir:

- Threads are loops of kind thread binding (a schedule's `bind`, or `T.thread_binding`). What threads do together is
  one loop nest per stage: where one thread reads what another wrote, reader and writer are two nests over the
  threads, one after the other. `relay_passes.emulate_kernels` then runs a kernel on the CPU by making every such loop
  serial, which is how kernels are tested where there is no GPU.
- Buffers that outlive a nest are declared around it, with an element for every thread that has one.
- Intrinsics (tensor cores, asynchronous copies) come by `tensorize` or annotations and only if
  `config["tensorize"]` is true; without it the same schedule keeps the plain block. Emitted kernels (`threads`) call
  device functions then (`device_code`), and are laid out as stages without it.
- A PrimFunc may launch several kernels, one for each top-level nest over `blockIdx`.
- x, y and the residual have the site's dtype, scale and bias are float32, sums are float32.
"""

from __future__ import annotations

from tvm_structured.schedules.base import Kernel
from tvm_structured.schedules.cuda.block_circulant import BlockCirculantKernel
from tvm_structured.schedules.cuda.debut import DeButKernel
from tvm_structured.schedules.cuda.dense import DenseKernel
from tvm_structured.schedules.cuda.low_rank import LowRankKernel
from tvm_structured.schedules.cuda.permuted_diagonal import PermutedDiagonalKernel
from tvm_structured.schedules.cuda.tensor_train import TensorTrainKernel
from tvm_structured.schedules.cuda.winograd import WinogradKernel

CUDA_KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        BlockCirculantKernel(),
        DeButKernel(),
        DenseKernel(),
        LowRankKernel(),
        PermutedDiagonalKernel(),
        TensorTrainKernel(),
        WinogradKernel(),
    )
}

__all__ = ["CUDA_KERNELS"]
