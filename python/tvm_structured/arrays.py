"""Arrays on their way into a module and out of it: numpy, torch and TVM's tensors, without copies where that goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_structured.errors import ModelError

ALIGNMENT = 64  # bytes


def is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def are_ready(expected: tuple[tuple[str, Any], ...] | None, arrays: Sequence[Any]) -> bool:
    """Whether all are torch tensors of these (dtype, shape) that TVM's call takes as they are."""
    torch = sys.modules.get("torch")
    if torch is None or expected is None or len(arrays) != len(expected):
        return False
    for (dtype, shape), array in zip(expected, arrays, strict=True):
        if (
            type(array) is not torch.Tensor
            or array.dtype is not getattr(torch, dtype, None)
            or array.shape != shape
            or array.requires_grad
            or not array.is_cpu
            or not array.is_contiguous()
            or array.data_ptr() % ALIGNMENT
        ):
            return False
    return True


def to_tvm(array: Any) -> Any:
    """The array as TVM's calls take it: itself where memory is contiguous and aligned as kernels expect, else a copy.

    TVM's calling convention reads torch tensors and numpy arrays within a microsecond; `from_dlpack` takes four.
    """
    if is_torch(array) and 0 not in array.shape:
        array = array.detach() if array.requires_grad else array
        array = array if array.is_contiguous() else array.contiguous()
        return array.clone() if array.data_ptr() % ALIGNMENT else array  # torch aligns what it allocates
    array = np.ascontiguousarray(array.detach() if is_torch(array) else array)
    if 0 in array.shape or array.dtype.isbuiltin != 1:  # such as bfloat16
        import tvm

        return tvm.runtime.tensor(array)
    return array if address(array) % ALIGNMENT == 0 and array.flags.writeable else aligned_copy(array)


def to_gpu(array: Any, device: Any, name: str) -> Any:
    """A tensor on the device: itself where it is torch's and already there, else a copy."""
    import tvm

    if not is_torch(array):
        return tvm.runtime.tensor(np.ascontiguousarray(array), device)
    array = array.detach() if array.requires_grad else array
    if not array.is_cuda:
        return tvm.runtime.from_dlpack(array.contiguous()).copyto(device)
    if array.get_device() != device.index:
        raise ModelError(f"{name}: is on {array.device}, the module runs on cuda:{device.index}; move it there")
    return array if array.is_contiguous() else array.contiguous()


def to_host(output: Any, as_torch: bool) -> Any:
    """Copies in the CPU's memory."""
    import tvm

    if not hasattr(output, "copyto"):
        return tuple(to_host(element, as_torch) for element in output)
    return convert(output.copyto(tvm.cpu()), as_torch)


def address(array: np.ndarray) -> int:
    """Of the first element; `array.ctypes.data` takes several times as long."""
    return int(array.__array_interface__["data"][0])


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy at an address that TVM's kernels take; ten times as fast as TVM's own for small arrays."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -address(memory) % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def from_tvm(output: Any, as_torch: bool) -> Any:
    """Tensors to numpy or torch; tuples and lists stay what they are, nested."""
    if is_torch(output):  # TVM's call makes them itself where it was given some
        return output
    if hasattr(output, "numpy"):
        return convert(output, as_torch)
    if isinstance(output, Sequence) or type(output).__name__ == "Array":
        return tuple(from_tvm(element, as_torch) for element in output)
    return output


def convert(tensor: Any, as_torch: bool) -> Any:
    if not as_torch:
        # without a copy; types that numpy lacks, such as bfloat16, and empty tensors take TVM's own way
        known = str(tensor.dtype) in np.sctypeDict and 0 not in tensor.shape
        return np.from_dlpack(tensor) if known else tensor.numpy()
    import torch

    return torch.from_numpy(tensor.numpy()) if 0 in tensor.shape else torch.from_dlpack(tensor)
