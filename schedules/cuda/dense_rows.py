"""x W^T for few rows: 16 bytes of a row of W are a unit."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda import device_code
from tvm_structured.schedules.cuda.few_rows import Few, FewRows, pack_units
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES, Registers, all_of, call
from tvm_structured.schedules.cuda.writer import RowWriter


def pack_rows(weight: np.ndarray, few: Few, dtype: str) -> np.ndarray:
    """(out, in) for `emit_rows`."""
    vector = VECTOR_BYTES // BYTES[dtype]
    out, inner = weight.shape
    units = -(-inner // vector)
    padded = np.zeros((out, units * vector), np.float32)
    padded[:, :inner] = weight
    return pack_units(padded.reshape(out, units, vector), few, dtype)


def emit_rows(
    few: Few, dtype: str, rows: Extent, x: Any, inner: int, packed: Any, writer: RowWriter, tensorize: bool
) -> None:
    """One kernel: writer = x W^T."""
    vector = VECTOR_BYTES // BYTES[dtype]
    kernel = FewRows(few, dtype, rows, (writer.out, -(-inner // vector)), vector, 1, packed, tensorize)

    def fetch(kernel: FewRows, unit: Any, row: Any) -> Registers:
        partial = None if inner % vector == 0 else (lambda k: unit * vector + k < inner)
        return kernel.fetch_run(x, row, unit * vector, vector, partial)

    def multiply(kernel: Any, acc: Registers, first: int, unit: Any, w: Registers, at: int, x: Registers) -> None:
        dot(kernel.tensorize, acc, first, w, at, x, vector)

    def store(kernel: Any, total: Any, row: Any, unit: Any, which: Any, conditions: Any) -> None:
        writer.store(total, row, unit, all_of(conditions))

    kernel.emit(fetch, multiply, store)


def dot(tensorize: bool, acc: Registers, first: int, a: Registers, at: int, b: Registers, count: int) -> None:
    """acc[first] += sum_k a[at + k] b[k]."""
    if tensorize:
        call(f"ts_dot<{count}>", acc.address(first), a.address(at), b.address(), source=device_code.DOT)
        return
    with I.serial(0, count) as k:
        acc[first] = acc[first] + a[at + k] * b[k]
