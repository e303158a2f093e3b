"""Toeplitz-like: y = sum_i A_i (B_i x) by Fourier transforms, two input vectors at a time as one complex vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.complex_fft import LongTransform, twiddles
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, either, parallel, prim_func, scratch, serial, when
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.space import around
from tvm_structured.structures.base import Structure
from tvm_structured.structures.toeplitz_like import ToeplitzLike


class ToeplitzLikeKernel(Kernel):
    """Threads over pairs of input vectors.

    A matrix of reals maps x + i x' to y + i y', so pairs cost no more than single vectors. All 2 + 2 rank transforms
    are one piece of code in a loop: forward of x, backward of B_i and forward for A_i, in the end backward of the sum.
    """

    name = "toeplitz_like"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        few = isinstance(site.rows, int) and site.rows <= 2
        yield from around({"threads": 1 if few else site.cpu.cores}, {"threads": (1, site.cpu.cores)})

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        """Spectra of the B_i and the A_i: (rank, which, re and im, length), divided by the length for the inverses."""
        assert isinstance(structure, ToeplitzLike)
        left, right = structure.symbols()
        spectra = np.stack([np.fft.fft(np.asarray(side, np.float64)) for side in (right, left)], axis=1)
        parts = np.stack([spectra.real, spectra.imag], axis=2) / structure.length
        return {"spectra": parts.astype(np.float32), "tables": twiddles(structure.length)}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        assert isinstance(structure, ToeplitzLike)
        e, (out, inner) = Emitter(site.cpu), structure.shape
        packed = self.pack(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, inner))
            spectra, tables = (arg(name, array.shape) for name, array in packed.items())
            writer = RowWriter(e, site.epilogue, site.rows, out)
            with (parallel if config["threads"] > 1 else serial)(0, ceildiv(site.rows, 2)) as pair:
                transform = LongTransform(e, structure.length, tables)
                PairEmitter(e, structure, site.rows, x, spectra, writer, transform).emit(pair * 2)
        return made.func


class PairEmitter:
    """The way of two input vectors."""

    def __init__(
        self, e: Emitter, member: ToeplitzLike, rows: Any, x: Any, spectra: Any, writer: RowWriter, long: LongTransform
    ) -> None:
        self.e, self.member, self.rows, self.x, self.spectra, self.writer = e, member, rows, x, spectra, writer
        self.long, self.length = long, member.length
        self.spectrum, self.total = (scratch((2, self.length)) for _ in range(2))

    def emit(self, row: Any) -> None:
        rank = self.member.rank
        self.read(row)
        with serial(0, 2 * rank + 2) as step:
            self.long.emit()

            def odd() -> None:
                either(step == 2 * rank + 1, lambda: self.write(row), self.truncate)

            def even() -> None:
                self.add(step // 2 - 1)
                either(step < 2 * rank, lambda: self.multiply(step // 2), self.finish)

            either(step == 0, self.keep, lambda: either(step % 2 == 1, odd, even))

    def each(self, count: int, body: Callable[[Any], None]) -> None:
        """body(first element) for vectors that cover `count` elements."""
        with serial(0, -(-count // self.e.lanes)) as v:
            body(v * self.e.lanes)

    def read(self, row: Any) -> None:
        """x + i x'; the last vector is its own partner where there is none."""
        e, inner = self.e, self.member.shape[1]
        rows = (row, tirx.min(row + 1, self.rows - 1))

        def vector(at: Any) -> None:
            for part in range(2):
                mask = e.mask(at, inner)
                value = (
                    e.load_or_zero(self.x, mask, rows[part], at) if inner % e.lanes else e.load(self.x, rows[part], at)
                )
                e.store(self.long.source, value, part, at)

        self.each(inner, vector)
        self.clear()

    def clear(self) -> None:
        """Zeros in the source behind the vectors that hold the first `in` elements."""
        e = self.e
        first = -(-self.member.shape[1] // e.lanes)
        with serial(0, self.length // e.lanes - first) as v:
            for part in range(2):
                e.store(self.long.source, e.splat(0.0), part, (first + v) * e.lanes)

    def keep(self) -> None:
        """The spectrum of x, for all B_i."""
        e = self.e

        def vector(at: Any) -> None:
            for part in range(2):
                e.store(self.spectrum, e.load(self.long.target, part, at), part, at)
                e.store(self.total, e.splat(0.0), part, at)

        self.each(self.length, vector)
        self.multiply(0)

    def multiply(self, i: Any) -> None:
        """B_i's spectrum times that of x, exchanged for the inverse."""
        self.each(self.length, lambda at: self.exchanged(*self.product(self.spectrum, i, 0, at), at))

    def product(self, buffer: Any, i: Any, which: int, at: Any) -> tuple[Any, Any]:
        e = self.e
        re, im = (e.bind(e.load(buffer, part, at)) for part in range(2))
        a, b = (e.bind(e.load(self.spectra, i, which, part, at)) for part in range(2))
        return re * a - im * b, re * b + im * a

    def exchanged(self, re: Any, im: Any, at: Any) -> None:
        self.e.store(self.long.source, im, 0, at)
        self.e.store(self.long.source, re, 1, at)

    def truncate(self) -> None:
        """B_i x: its first `in` elements."""
        e, inner = self.e, self.member.shape[1]

        def vector(at: Any) -> None:
            for part in range(2):
                value = e.load(self.long.target, 1 - part, at)
                if inner % e.lanes:
                    value = tirx.Select(e.mask(at, inner), value, e.splat(0.0))
                e.store(self.long.source, value, part, at)

        self.each(inner, vector)
        self.clear()

    def add(self, i: Any) -> None:
        """A_i's spectrum times that of B_i x, onto the sum."""
        e = self.e

        def vector(at: Any) -> None:
            for part, value in enumerate(self.product(self.long.target, i, 1, at)):
                e.store(self.total, e.load(self.total, part, at) + value, part, at)

        self.each(self.length, vector)

    def finish(self) -> None:
        e = self.e
        self.each(self.length, lambda at: self.exchanged(*(e.load(self.total, part, at) for part in range(2)), at))

    def write(self, row: Any) -> None:
        """y and y', through the epilogue."""
        e, out = self.e, self.member.shape[0]

        def vector(part: int) -> None:
            # exchanged: the real part comes last
            self.each(out, lambda at: self.put(e.bind(e.load(self.long.target, 1 - part, at)), row + part, at))

        vector(0)
        with when(row + 1 < self.rows):
            vector(1)

    def put(self, value: Any, row: Any, at: Any) -> None:
        self.writer.store(value, row, at, masked=self.member.shape[0] % self.e.lanes != 0)
