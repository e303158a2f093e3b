"""DeBut on CUDA: a kernel for each stage of the chain, neighbouring factors multiplied at compile time.

A stage is new[b, i, d] = sum_j grid[b, i, j, d] old[b, j, d]; a thread makes one output for some rows of x. Weights are
packed (s, outputs), so that neighbouring threads read neighbours. Intermediates are float32 and stay in L2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.threads import BYTES, ceildiv, f32, i32, launch, scratch, under
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.debut import stages_of
from tvm_structured.schedules.debut_plan import Stage, merge
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure
from tvm_structured.structures.debut_fit import merge_all

# a small model of the card, to weigh another launch against larger factors
LAUNCH, BANDWIDTH, ARITHMETIC = 2.0, 2e6, 1e7  # us, bytes/us, multiply-adds/us
TERM = 0.08  # us that a thread waits for one term of its sum
MOST_FACTORS = 12  # of longer chains only the plain cuts are weighed


class DeButKernel(Kernel):
    """`cuts`: which factors are multiplied into one; threads and rows of x to a block."""

    name = "debut"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        rows = site.rows if isinstance(site.rows, int) else 16
        together = max(r for r in (1, 2, 4, 8) if r <= max(rows, 1))
        for cuts in best_cuts(stages_of(structure), rows, BYTES[site.dtype]):
            for threads in (128, 64, 256):
                yield {"cuts": list(cuts), "threads": threads, "rows": together}

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        grids = [np.asarray(grid, np.float64) for grid in structure.factors.values()]
        merged = [merge_all(grids[first:end]) for first, end in pairwise(config["cuts"])]
        dtype = numpy_type(site.dtype)
        return {
            f"stage{k}": np.ascontiguousarray(grid.transpose(2, 0, 1, 3).reshape(grid.shape[2], -1)).astype(dtype)
            for k, grid in enumerate(merged)
        }

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        every = stages_of(structure)
        stages = [merge(every[first:end]) for first, end in pairwise(config["cuts"])]
        with prim_func(self.name) as made:
            old = arg("x", (site.rows, structure.shape[1]), site.dtype)
            weights = [arg(f"stage{k}", (s.s, s.outputs), site.dtype) for k, s in enumerate(stages)]
            writer = RowWriter(site, structure.shape[0])
            for k, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
                onto = writer
                if k + 1 < len(stages):
                    between = scratch((site.rows, stage.outputs), "float32")
                    onto = RowWriter.onto(between, site.rows, stage.outputs, "float32")
                emit_stage(stage, config, old, weight, onto)
                old = onto.y
        return made.func


def best_cuts(stages: Sequence[Stage], rows: int, element: int) -> list[tuple[int, ...]]:
    """Where to cut the chain into kernels, the best ways first by the model above."""
    inner = range(1, len(stages))
    if len(stages) > MOST_FACTORS:
        ways = [(0, *inner[::step], len(stages)) for step in (1, 2, 3, 4)]
    else:
        ways = [(0, *some, len(stages)) for count in range(len(stages)) for some in combinations(inner, count)]

    def time(cuts: tuple[int, ...]) -> float:
        merged = [merge(stages[first:end]) for first, end in pairwise(cuts)]
        work = sum(stage.num_params for stage in merged) * (element / BANDWIDTH + rows / ARITHMETIC)
        return work + sum(LAUNCH + TERM * stage.s for stage in merged)

    return sorted(dict.fromkeys(ways), key=time)[:3]


def emit_stage(stage: Stage, config: Config, old: Any, weight: Any, writer: RowWriter) -> None:
    count, rows, together = stage.outputs, writer.site.rows, config["rows"]
    grid = (ceildiv(count, config["threads"]), ceildiv(rows, together))
    with launch(grid, config["threads"], not config.get("tensorize", True)) as (t, (bx, by)):
        with t.last_stage():
            output, first = bx * config["threads"] + t.tx, by * together

            def body() -> None:
                acc = t.registers(together)
                acc.fill()
                start = output // (stage.r * stage.t) * (stage.s * stage.t) + output % stage.t
                with I.serial(0, stage.s) as j:
                    factor = t.value(f32(weight[j, output]))
                    for r in range(together):
                        row = first if together == 1 else tirx.Min(first + r, i32(rows) - 1)
                        acc[r] = acc[r] + factor * f32(old[row, start + j * stage.t])
                for r in range(together):
                    complete = together == 1 or (isinstance(rows, int) and rows % together == 0)
                    writer.store(acc[r], first + r, output, True if complete else first + r < rows)

            under(True if count % config["threads"] == 0 else output < count, body)
