"""Kernels: one per structure, plus `dense` and `conv2d`. KERNELS is the table; the key is the name everywhere."""

from __future__ import annotations

from tvm_structured.schedules.base import Config, ConvGeometry, Epilogue, Kernel, Site
from tvm_structured.schedules.block_circulant import BlockCirculantKernel
from tvm_structured.schedules.conv2d import Conv2dKernel
from tvm_structured.schedules.cp import CPKernel
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.debut import DeButKernel
from tvm_structured.schedules.dense import DenseKernel
from tvm_structured.schedules.low_rank import LowRankKernel
from tvm_structured.schedules.permuted_diagonal import PermutedDiagonalKernel
from tvm_structured.schedules.spatial_low_rank import SpatialLowRankKernel
from tvm_structured.schedules.tensor_train import TensorTrainKernel
from tvm_structured.schedules.toeplitz_like import ToeplitzLikeKernel
from tvm_structured.schedules.tucker import TuckerKernel
from tvm_structured.schedules.winograd import WinogradKernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        DenseKernel(),
        Conv2dKernel(),
        BlockCirculantKernel(),
        CPKernel(),
        DeButKernel(),
        LowRankKernel(),
        PermutedDiagonalKernel(),
        SpatialLowRankKernel(),
        TensorTrainKernel(),
        ToeplitzLikeKernel(),
        TuckerKernel(),
        WinogradKernel(),
    )
}

__all__ = ["KERNELS", "Config", "ConvGeometry", "Cpu", "Epilogue", "Kernel", "Site"]
