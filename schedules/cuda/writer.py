"""The end of a kernel whose result is y (rows, out): the epilogue's operands, masks, stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.epilogue import finished
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES, Threads, all_of, under
from tvm_structured.schedules.emit import arg
from tvm_structured.schedules.gpu import Gpu, GpuSite


class RowWriter:
    """Declares the epilogue's operands and y as parameters of the PrimFunc, and writes finished elements of y."""

    def __init__(self, site: GpuSite, out: int) -> None:
        self.site, self.out = site, out
        shapes = {"scale": (out,), "bias": (out,), "residual": (site.rows, out)}
        self.operands = {
            name: arg(name, shapes[name], site.dtype if name == "residual" else "float32")
            for name in site.epilogue.operands
        }
        self.y = arg("y", (site.rows, out), site.dtype)

    @classmethod
    def onto(cls, buffer: Any, rows: Extent, out: int, dtype: str) -> RowWriter:
        """A writer without an epilogue onto a buffer (rows, out) that exists: one stage of several."""
        writer = cls.__new__(cls)
        writer.site, writer.out = GpuSite((rows, out), (rows, out), Gpu(), dtype=dtype), out
        writer.operands, writer.y = {}, buffer
        return writer

    def store(self, total: Any, row: Any, column: Any, valid: Any = True) -> None:
        """Finish one float32 sum and store it as element (row, column)."""

        def body() -> None:
            value = finished(total, self.site, self.operands, (row, column), column)
            I.buffer_store(self.y, value, [row, column])

        under(valid, body)

    def store_run(self, t: Threads, totals: Sequence[Any], row: Any, exists: Any, column: Any) -> None:
        """Columns from `column` on (a multiple of their number), those that exist; in one store where it can be."""
        most = VECTOR_BYTES // BYTES[self.site.dtype]
        if len(totals) > most and len(totals) % most == 0:
            for j in range(0, len(totals), most):
                self.store_run(t, totals[j : j + most], row, exists, column + j)
            return
        count = len(totals)
        if self.out % count or count not in (2, 4, 8):
            for j in range(count):
                self.store(totals[j], row, column + j, all_of([exists, column + j < self.out]))
            return
        run = t.registers(count, self.site.dtype)

        def body() -> None:
            for j in range(count):
                run[j] = finished(totals[j], self.site, self.operands, (row, column + j), column + j)
            I.buffer_store(self.y, run.vector(0, count), [row, I.ramp(column, 1, count)])

        under(all_of([exists, column < self.out]), body)
