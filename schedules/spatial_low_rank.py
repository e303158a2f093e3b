"""Spatial low rank: a vertical and a horizontal convolution in one kernel."""

from __future__ import annotations

from tvm_structured.schedules.conv_chain import ConvChainKernel


class SpatialLowRankKernel(ConvChainKernel):
    name = "spatial_low_rank"
