"""Attention: y[b, i, h] = softmax_j(scale * q[b, h, i] . k[b, h, j] + bias[b, h, i, j]) v[b, h, j], in one kernel.

A unit of work is a block of queries of one head. Their scores lie transposed, keys by queries, queries in lanes, in a
workspace that stays in the cache; so the maximum and the sum of a softmax run down the keys without any exchange
between lanes, and only the block's queries are transposed. Operands are read where they lie: by strides, for
example out of the joined (batch, tokens, 3 * heads * depth) result of one projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import (
    Emitter,
    arg,
    ceildiv,
    held,
    parallel,
    prim_func,
    row_blocks,
    scratch,
    serial,
    when,
)
from tvm_structured.schedules.exponential import exp_below_zero
from tvm_structured.schedules.shuffles import deinterleave

FLOPS_WORTH_A_THREAD = 400_000
LOWEST = -3.4028234663852886e38  # the most negative finite float32


@dataclass(frozen=True)
class Strided:
    """Where an operand's elements lie in a contiguous array: offset + sum of index times stride, in elements."""

    shape: tuple[Extent, ...]  # of the array
    strides: tuple[Extent, ...]  # (batch, head, token, feature); of a bias (batch, head, query, key)
    offset: Extent = 0


@dataclass(frozen=True)
class Attention:
    """Sizes and operands. `depth`, `width` (features of a query and of a value) and `heads` are numbers.

    is_safe: a query whose scores are all -inf gets zeros; else it gets NaN, as softmax gives.
    order: the axes (batch, query, head, feature) of y as a permutation that ends in feature.
    """

    batch: Extent
    heads: int
    queries: Extent
    keys: Extent
    depth: int
    width: int
    scale: float
    q: Strided
    k: Strided
    v: Strided
    bias: Strided | None = None
    is_safe: bool = False
    order: tuple[int, ...] = (0, 1, 2, 3)

    @property
    def y_shape(self) -> tuple[Extent, ...]:
        sizes = (self.batch, self.queries, self.heads, self.width)
        return tuple(sizes[axis] for axis in self.order)

    @property
    def operands(self) -> tuple[Strided, ...]:
        return tuple(each for each in (self.q, self.k, self.v, self.bias) if each is not None)

    @property
    def flops(self) -> Extent:
        return 2 * self.batch * self.heads * self.queries * self.keys * (self.depth + self.width)


def attention_func(attention: Attention, cpu: Cpu) -> Any:
    """The kernel. Arguments: q, k, v, the bias if there is one, y."""
    e = Emitter(cpu)
    with prim_func("attention") as made:
        names = ("q", "k", "v", "bias")
        operands = [arg(name, each.shape) for name, each in zip(names, attention.operands, strict=False)]
        y = arg("y", attention.y_shape)
        _Emission(e, attention, [flattened(operand) for operand in operands], y).run()
    return made.func


def flattened(buffer: Any) -> Any:
    """The same memory with one index."""
    size = reduce(lambda a, b: a * b, buffer.shape)
    return I.decl_buffer((size,), str(buffer.dtype), data=buffer.data)


def count_of(size: Extent) -> int:
    """A number to plan with; symbolic extents count as many."""
    return size if isinstance(size, int) else 1 << 10


class _Emission:
    """The kernel's body, one method for each step of a unit."""

    def __init__(self, e: Emitter, attention: Attention, flat: list[Any], y: Any) -> None:
        self.e, self.a, self.y = e, attention, y
        self.q, self.k, self.v, *biases = flat
        self.bias = biases[0] if biases else None
        self.vectors = 2 if count_of(attention.queries) > e.lanes else 1  # of queries to a block
        self.block = self.vectors * e.lanes
        self.rows = 8 if e.cpu.registers >= 32 else 4

    def run(self) -> None:
        a = self.a
        blocks = ceildiv(a.queries, self.block)
        is_large = not isinstance(a.flops, int) or a.flops >= FLOPS_WORTH_A_THREAD
        loop = parallel if is_large and self.e.cpu.cores > 1 else serial
        with loop(0, a.batch * a.heads * blocks) as unit:
            head = unit // blocks
            self.unit(held(head // a.heads), held(head % a.heads), held(unit % blocks * self.block))

    def unit(self, b: Any, h: Any, first: Any) -> None:
        a, e = self.a, self.e
        queries, scores = scratch((a.depth, self.block)), scratch((a.keys, self.block))
        shares = scratch((self.block,))
        self.transpose_queries(queries, b, h, first)
        peaks = self.scores_of(queries, scores, b, h, first)
        sums = self.exponentials(scores, peaks)
        for n, total in enumerate(sums):
            share = e.splat(1.0) / total[0]
            if a.is_safe:
                share = tirx.Select(tirx.EQ(total[0], e.splat(0.0)), e.splat(0.0), share)
            e.store(shares, share, n * e.lanes)
        self.weighted_values(scores, shares, b, h, first)

    def transpose_queries(self, queries: Any, b: Any, h: Any, first: Any) -> None:
        """queries[d, i] = scale * q[first + i, d]; the last query stands in for those past the end."""
        a, e = self.a, self.e
        start = self.start(a.q, b, h)

        def row(i: Any) -> Any:
            return start + tirx.min(first + i, a.queries - 1) * a.q.strides[2]

        if not (isinstance(a.q.strides[3], int) and a.q.strides[3] == 1):
            with serial(0, self.block) as i:
                begin = held(row(i))
                with serial(0, a.depth) as d:
                    value = self.q[begin + d * a.q.strides[3]]
                    I.buffer_store(queries, value * I.float32(a.scale), [d, i])
            return
        for group in range(0, self.block, e.lanes):
            begins = [held(row(group + i)) for i in range(e.lanes)]
            with serial(0, a.depth // e.lanes) as part:
                tile = [e.bind(e.load(self.q, begin + part * e.lanes)) for begin in begins]
                self.store_columns(queries, tile, part * e.lanes, group, e.lanes)
            rest = a.depth % e.lanes
            if rest:
                mask = e.bind_mask(a.depth - rest, a.depth)
                tile = [e.bind(e.load_masked(self.q, mask, begin + a.depth - rest)) for begin in begins]
                self.store_columns(queries, tile, a.depth - rest, group, rest)

    def store_columns(self, queries: Any, tile: list[Any], d: Any, group: int, count: int) -> None:
        """The first `count` columns of a square tile, whose rows are given."""
        for c, column in enumerate(deinterleave(self.e, tile)[:count]):
            self.e.store(queries, column * self.e.splat(self.a.scale), d + c, group)

    def scores_of(self, queries: Any, scores: Any, b: Any, h: Any, first: Any) -> list[Any]:
        """scores[j, i] = q_i . k_j + bias; the largest score of each query."""
        a, e = self.a, self.e
        start = self.start(a.k, b, h)
        first_score = self.bias_of(scores, b, h, first)
        peaks = e.registers(self.vectors)
        for peak in peaks:
            e.set(peak, e.splat(float("-inf")))

        def block(key: Any, rows: int) -> None:
            at = held(start + key * a.k.strides[2])
            acc = [e.registers(self.vectors) for _ in range(rows)]
            for i in range(rows):
                for n in range(self.vectors):
                    e.set(acc[i][n], first_score(key + i, n))

            def step(d: Any) -> None:
                columns = [e.bind(e.load(queries, d, n * e.lanes)) for n in range(self.vectors)]
                for i in range(rows):
                    number = e.bind(e.splat(self.k[at + i * a.k.strides[2] + d * a.k.strides[3]]))
                    for n in range(self.vectors):
                        e.set(acc[i][n], acc[i][n][0] + number * columns[n])

            unrolled(a.depth, 4, step)
            for i in range(rows):
                for n in range(self.vectors):
                    e.store(scores, acc[i][n][0], key + i, n * e.lanes)
                    e.set(peaks[n], I.max(peaks[n][0], acc[i][n][0]))

        row_blocks(a.keys, self.rows, block)
        return peaks

    def bias_of(self, scores: Any, b: Any, h: Any, first: Any) -> Callable[[Any, int], Any]:
        """What a score starts from. A bias that differs from query to query is transposed into `scores` first."""
        a, e = self.a, self.e
        if a.bias is None:
            return lambda key, n: e.splat(0.0)
        along_batch, along_head, along_query, along_key = a.bias.strides
        start = held(a.bias.offset + b * along_batch + h * along_head)
        if isinstance(along_query, int) and along_query == 0:
            return lambda key, n: e.splat(self.bias[start + key * along_key])
        with serial(0, self.block) as i:
            row = held(start + tirx.min(first + i, a.queries - 1) * along_query)
            with serial(0, a.keys) as key:
                I.buffer_store(scores, self.bias[row + key * along_key], [key, i])
        return lambda key, n: e.load(scores, key, n * e.lanes)

    def exponentials(self, scores: Any, peaks: list[Any]) -> list[Any]:
        """scores[j, i] becomes exp(scores[j, i] - peak_i); their sums over j."""
        a, e = self.a, self.e
        sums = e.registers(self.vectors)
        e.zero(sums)
        if a.is_safe:  # -inf less -inf would be NaN
            for peak in peaks:
                e.set(peak, I.max(peak[0], e.splat(LOWEST)))
        with serial(0, a.keys) as key:
            for n in range(self.vectors):
                value = e.bind(exp_below_zero(e, e.load(scores, key, n * e.lanes) - peaks[n][0]))
                e.store(scores, value, key, n * e.lanes)
                e.set(sums[n], sums[n][0] + value)
        return sums

    def weighted_values(self, scores: Any, shares: Any, b: Any, h: Any, first: Any) -> None:
        """y[i] = share_i * sum_j scores[j, i] v[j], features in lanes."""
        a, e = self.a, self.e
        start = self.start(a.v, b, h)
        columns = ceildiv(a.width, e.lanes)
        count = tirx.min(self.block, a.queries - first)
        for begin in range(0, columns, 2):
            features = [n * e.lanes for n in range(begin, min(begin + 2, columns))]
            with serial(0, ceildiv(count, self.rows)) as group:
                self.value_block(scores, shares, (b, h, first), start, held(group * self.rows), features)

    def value_block(self, scores: Any, shares: Any, at: Any, start: Any, first_row: Any, features: list[int]) -> None:
        a, e = self.a, self.e
        b, h, first = at
        masks = [e.bind_mask(f, a.width) if f + e.lanes > a.width else None for f in features]
        acc = [e.registers(len(features)) for _ in range(self.rows)]
        for row in acc:
            e.zero(row)

        def step(key: Any) -> None:
            panel = []
            for f, mask in zip(features, masks, strict=True):
                index = start + key * a.v.strides[2] + f
                panel.append(e.bind(e.load(self.v, index) if mask is None else e.load_masked(self.v, mask, index)))
            for i in range(self.rows):
                number = e.bind(e.splat(scores[key, first_row + i]))
                for n in range(len(features)):
                    e.set(acc[i][n], acc[i][n][0] + number * panel[n])

        unrolled(a.keys, 4, step)
        for i in range(self.rows):
            with when(first + first_row + i < a.queries):
                place = (b, first + first_row + i, h)
                lead = [place[axis] for axis in a.order[:3]]
                share = e.bind(e.splat(shares[first_row + i]))
                for n, (f, mask) in enumerate(zip(features, masks, strict=True)):
                    if mask is None:
                        e.store(self.y, acc[i][n][0] * share, *lead, f)
                    else:
                        e.store_masked(self.y, acc[i][n][0] * share, mask, *lead, f)

    @staticmethod
    def start(operand: Strided, b: Any, h: Any) -> Any:
        """Index of the first element of a head."""
        return held(operand.offset + b * operand.strides[0] + h * operand.strides[1])


def unrolled(extent: Extent, factor: int, step: Callable[[Any], None]) -> None:
    """step(0), step(1), ..., `factor` of them to an iteration."""
    with serial(0, extent // factor) as outer:
        for inner in range(factor):
            step(outer * factor + inner)
    rest = extent % factor
    if not isinstance(rest, int):
        with serial(0, rest) as inner:
            step(extent // factor * factor + inner)
        return
    for inner in range(rest):
        step(extent // factor * factor + inner)
