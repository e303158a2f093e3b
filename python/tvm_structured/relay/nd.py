"""`tvm.nd` as TVM 0.19 had it; today the arrays are tvm.runtime.Tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.runtime import Tensor as NDArray
from tvm.runtime import cpu, device, from_dlpack, tensor
from tvm.runtime import empty as _empty

__all__ = ["NDArray", "array", "cpu", "device", "empty", "from_dlpack"]


def array(arr: Any, device: Any = None, mem_scope: str | None = None) -> Any:
    """A copy of a numpy array, a torch tensor, a list or a TVM tensor."""
    if not isinstance(arr, (np.ndarray, NDArray)):
        arr = np.asarray(arr.detach() if hasattr(arr, "detach") else arr)
    return tensor(arr, device, mem_scope)


def empty(shape: Any, dtype: str = "float32", device: Any = None, mem_scope: str | None = None) -> Any:
    """An array whose values are not set."""
    return _empty(tuple(shape) if hasattr(shape, "__iter__") else (shape,), dtype, device, mem_scope)
