"""Tucker-2: three convolutions in one kernel."""

from __future__ import annotations

from tvm_structured.schedules.conv_chain import ConvChainKernel


class TuckerKernel(ConvChainKernel):
    name = "tucker"
