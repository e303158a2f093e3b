"""Arrays beside protected pages: a read or a write out of bounds ends the process."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np

ALIGNMENT = 64  # bytes; TVM takes no tensor that is aligned to less


def plain_buffer(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An aligned array, NaN in its padding."""
    return guarded_buffer(shape, dtype, at_end=True)


def guarded_buffer(shape: Sequence[int], dtype: str, at_end: bool = True) -> np.ndarray:
    """An array whose last (or first) byte lies at a page that nobody may touch.

    TVM wants 64-byte alignment, so up to 63 bytes may remain between the end and that page. They are 0xff
    (NaN as float32): see `slack_of`.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    padded = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
    pages = -(-padded // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        where = ctypes.c_void_p(address + page * mmap.PAGESIZE)
        if libc.mprotect(where, ctypes.c_size_t(mmap.PAGESIZE), 0):  # 0: PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    start = mmap.PAGESIZE + (pages * mmap.PAGESIZE - padded if at_end else 0)
    flat = np.frombuffer(region, np.uint8, padded, start)
    flat[:] = 0xFF
    return flat[:size].view(dtype).reshape(shape)


def slack_of(array: np.ndarray) -> np.ndarray:
    """The bytes between the end of a `guarded_buffer` and the next 64-byte boundary."""
    size = -array.nbytes % ALIGNMENT
    return np.ctypeslib.as_array(ctypes.cast(array.ctypes.data + array.nbytes, ctypes.POINTER(ctypes.c_uint8)), (size,))


def filled(values: np.ndarray, allocate: Callable[..., np.ndarray]) -> np.ndarray:
    buffer = allocate(values.shape, str(values.dtype))
    buffer[...] = values
    return buffer
