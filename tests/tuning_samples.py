"""Tasks for the tests of tuning, and a measurer whose times are known."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from kernel_harness import target_for
from tvm import te

from tvm_structured.schedules import KERNELS, Config, Cpu, Epilogue, Site
from tvm_structured.structures import STRUCTURES, Dense, Unstructured
from tvm_structured.tuning.session import WeightedTask
from tvm_structured.tuning.tasks import KernelTask, config_text
from tvm_structured.tuning.workers import Measured

SIZES: dict[str, dict[str, Any]] = {
    "dense": {},
    "block_circulant": {"block": 8},
    "permuted_diagonal": {"block": 8},
    "tensor_train": {"out_modes": (8, 8), "in_modes": (8, 8), "rank": 4},
    "low_rank": {"rank": 8},
}


def sample_task(name: str = "permuted_diagonal", rows: int = 4, target: Any = None, epilogue: Any = None) -> KernelTask:
    """A 64 x 64 layer in one of the forms."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    family = {**STRUCTURES, "dense": Unstructured}[name]
    target = target or target_for()
    site = Site((rows, 64), (rows, 64), Cpu.of(target), epilogue or Epilogue(bias=True, activation="relu"))
    return KernelTask.of(KERNELS[name], family.from_dense(Dense("w", weight), **SIZES[name]), site, target)


def weighted(*names: str) -> list[WeightedTask]:
    return [WeightedTask(sample_task(name)) for name in names]


def product(rows: int = 16, out: int = 32, inner: int = 24, rule: str = "") -> Any:
    """y = x W^T as loops; `rule` is the mark of its block."""
    x, weight = te.placeholder((rows, inner), name="x"), te.placeholder((out, inner), name="weight")
    k = te.reduce_axis((0, inner), "k")
    attrs = {"schedule_rule": rule} if rule else {}
    y = te.compute((rows, out), lambda i, j: te.sum(x[i, k] * weight[j, k], axis=k), name="y", attrs=attrs)
    return te.create_prim_func([x, weight, y], index_dtype_override="int64")


class FakeMeasurer:
    """Times are a function of the configuration. `stop_after`: raises KeyboardInterrupt after so many trials."""

    def __init__(self, stop_after: int | None = None, fails: Sequence[int] = ()) -> None:
        self.stop_after, self.fails = stop_after, fails
        self.measured: list[str] = []

    @staticmethod
    def seconds(task: KernelTask, config: Config) -> float:
        return 1e-5 * (1 + zlib.crc32((task.key + config_text(config)).encode()) / 2**32)

    def measure(self, task: Any, configs: Sequence[Config], limit: float) -> Iterator[tuple[int, Measured]]:
        for index, config in enumerate(configs):
            if len(self.measured) == self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(config_text(config))
            failed = len(self.measured) in self.fails
            yield index, Measured(None, "told to fail") if failed else Measured(self.seconds(task, config))

    def compare(self, task: Any, configs: Sequence[Config], rounds: int) -> list[list[float]] | None:
        return [[self.seconds(task, config)] * rounds for config in configs]

    def close(self) -> None:
        pass
