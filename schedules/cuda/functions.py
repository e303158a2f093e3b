"""What all CUDA kernels share: how a schedule becomes the PrimFunc of a kernel, and the types of constants."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def kernel_func(schedule: Any) -> Any:
    """The scheduled PrimFunc, marked: fusion leaves it alone and nobody schedules it again."""
    func = schedule.mod["main"].without_attr("global_symbol")
    return func.with_attr({"tirx.is_scheduled": True, "op_pattern": 8})  # 8 is TVM's kOpaque


def numpy_type(dtype: str) -> Any:
    """The numpy type of a name; bfloat16 is that of ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
