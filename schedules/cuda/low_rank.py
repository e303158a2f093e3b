"""Low rank on CUDA: y = U (V x), two launches, a warp to every sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.epilogue import finished, operand_placeholders
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.emit import i64
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure


class LowRankKernel(Kernel):
    """Two matrix-vector products; the thin intermediate is float32 and stays in L2."""

    name = "low_rank"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        for warps, vector in ((4, 8), (8, 8), (2, 4), (4, 4)):
            yield {"warps": warps, "vector": vector}

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        dtype = numpy_type(site.dtype)
        return {name: np.ascontiguousarray(structure.factors[name]).astype(dtype) for name in ("v", "u")}

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        (out, inner), rank = structure.shape, structure.factors["v"].shape[0]
        x = te.placeholder((i64(site.rows), i64(inner)), site.dtype, "x")
        v = te.placeholder((i64(rank), i64(inner)), site.dtype, "v")
        u = te.placeholder((i64(out), i64(rank)), site.dtype, "u")
        operands = operand_placeholders(site)
        lanes, vector = site.gpu.warp, config["vector"]
        total = product("wide", product("thin", x, v, lanes, vector), u, lanes, vector)
        y = te.compute(
            (i64(site.rows), i64(out)), lambda r, o: finished(total[r, o], site, operands, (r, o), o), name="y"
        )
        func = te.create_prim_func([x, v, u, *operands.values(), y], index_dtype_override="int64")
        schedule = s_tir.Schedule(func)
        sum_by_warp(schedule, "thin", None, config["warps"])
        sum_by_warp(schedule, "wide", "y", config["warps"])
        return (
            schedule.mod["main"].without_attr("global_symbol").with_attr({"tirx.is_scheduled": True, "op_pattern": 8})
        )


def product(name: str, x: Any, weight: Any, lanes: int, vector: int) -> Any:
    """x weight^T with float32 sums; every lane has a sum of its own, of `vector` consecutive terms at a time.

    The partial sums are a stage of the definition: `rfactor` forgets that the last step is not full (TVM 0.27).
    """
    features, depth = (int(extent) for extent in weight.shape)
    chunk = lanes * vector
    step = te.reduce_axis((i64(0), i64(-(-depth // chunk))), "step")
    element = te.reduce_axis((i64(0), i64(vector)), "element")
    lane = te.reduce_axis((i64(0), i64(lanes)), "lane")

    def term(r: Any, o: Any, t: Any) -> Any:
        k = step * chunk + t * vector + element
        value = tirx.Cast("float32", x[r, k]) * tirx.Cast("float32", weight[o, k])
        if depth % chunk:
            value = tirx.if_then_else(k < depth, value, tirx.FloatImm("float32", 0.0))
        return te.sum(value, axis=[step, element])

    partial = te.compute((x.shape[0], i64(features), i64(lanes)), term, name=f"{name}_partial")
    return te.compute((x.shape[0], i64(features)), lambda r, o: te.sum(partial[r, o, lane], axis=lane), name=name)


def sum_by_warp(schedule: Any, stage: str, last: str | None, warps: int) -> None:
    """A warp to every output; `last` is the stage that takes the sum, None where it goes to memory as it is."""
    block, partial = schedule.get_sblock(stage), schedule.get_sblock(f"{stage}_partial")
    row, feature, lane = schedule.get_loops(block)
    outer, group = schedule.split(feature, [None, warps])
    schedule.bind(schedule.fuse(row, outer), "blockIdx.x")
    schedule.bind(group, "threadIdx.y")
    schedule.bind(lane, "threadIdx.x")
    schedule.compute_at(partial, lane)
    schedule.set_scope(partial, 0, "local")
    if last is not None:
        schedule.set_scope(block, 0, "local")
        schedule.reverse_compute_at(schedule.get_sblock(last), group)
