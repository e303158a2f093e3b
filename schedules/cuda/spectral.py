"""Products in a transform domain for many rows: transform x, multiply frequency by frequency, transform back.

Three kernels with two intermediates that stay in L2:

    forward   x (rows, in)                        -> X (batches, planes, rows, in units)      of x's type
    product   X[b] W[b]^T, real or complex        -> Y (batches, planes, rows, out units)     float32
    inverse   Y                                   -> y (rows, out), epilogue included

A structure says how one unit (a block of x or of y) goes there and back; a thread does that in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.gemm import Gemm
from tvm_structured.schedules.cuda.threads import Threads, all_of, ceildiv, launch, multiple, scratch, under
from tvm_structured.schedules.cuda.tile import Operand, Tile, pack_operand
from tvm_structured.schedules.cuda.writer import RowWriter

THREADS = 128


@dataclass(frozen=True)
class Domain:
    """`batches` products of `planes` (2: complex) each, between `units` of (out, in).

    forward(threads, row, unit, exists) -> (batch, plane) -> float32 value, for one unit of x (zeros where it does not
    exist); inverse(threads, load, unit) -> the values of one unit of y, given load(batch, plane).
    `split_first`: the planes of batch 0 are two real products.
    """

    batches: int
    planes: int
    units: tuple[int, int]
    forward: Callable[[Threads, Any, Any], Mapping[tuple[int, int], Any]]
    inverse: Callable[[Threads, Callable[[Any, Any], Any], Any], list[Any]]
    split_first: bool = False


def pack_domain(weight: np.ndarray, tile: Tile, dtype: str) -> np.ndarray:
    """Weights (batches, planes, out units, in units)."""
    return pack_operand(weight, tile, numpy_type(dtype))


def emit_domain(
    domain: Domain,
    tile: Tile,
    weight: Any,
    writer: RowWriter,
    place: Callable[[Any], Any],
    tensorize: bool,
) -> None:
    """The kernels. place(unit) is the first column of a unit of y."""
    rows, dtype = writer.site.rows, writer.site.dtype
    out, inner = (multiple(units, 8) for units in domain.units)
    spectra = scratch((domain.batches, domain.planes, rows, inner), dtype)
    emit_forward(domain, rows, inner, dtype, spectra, tensorize)

    operand = Operand(spectra, lambda batch, plane, row, k: (batch, plane, row, k), inner, True)
    gemm = Gemm(
        tile,
        dtype,
        rows,
        out,
        operand,
        weight,
        planes=domain.planes,
        batches=domain.batches,
        split_first=domain.split_first,
        tensorize=tensorize,
    )

    products = scratch((domain.batches, domain.planes, rows, out), "float32")

    def store(t: Threads, batch: Any, row: Any, exists: Any, column: Any, values: Any) -> None:
        for plane in range(domain.planes):
            pair = t.registers(2)
            for j in range(2):
                pair[j] = values[j][plane]

            def body(plane: int = plane, pair: Any = pair) -> None:
                I.buffer_store(products, pair.vector(0, 2), [batch, plane, row, I.ramp(column, 1, 2)])

            under(all_of([exists, column < out]), body)

    gemm.emit(store)
    emit_inverse(domain, rows, products, writer, place, tensorize)


def emit_forward(domain: Domain, rows: Extent, inner: int, dtype: str, spectra: Any, tensorize: bool) -> None:
    """A thread to every unit of every row; units up to a multiple of 8 are zero."""
    with launch((ceildiv(inner, THREADS), rows), THREADS, not tensorize) as (t, (bx, row)):
        with t.last_stage():
            unit = bx * THREADS + t.tx

            def body() -> None:
                for (batch, plane), value in domain.forward(t, row, unit).items():
                    I.buffer_store(spectra, tirx.Cast(dtype, value), [batch, plane, row, unit])

            under(True if inner % THREADS == 0 else unit < inner, body)


def emit_inverse(
    domain: Domain, rows: Extent, products: Any, writer: RowWriter, place: Callable[[Any], Any], tensorize: bool
) -> None:
    out = domain.units[0]
    with launch((ceildiv(out, THREADS), rows), THREADS, not tensorize) as (t, (bx, row)):
        with t.last_stage():
            unit = bx * THREADS + t.tx

            def body() -> None:
                values = domain.inverse(t, lambda batch, plane: products[batch, plane, row, unit], unit)
                writer.store_run(t, values, row, True, place(unit))

            under(True if out % THREADS == 0 else unit < out, body)
