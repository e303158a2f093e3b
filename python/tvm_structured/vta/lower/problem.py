"""What can be cut into tiles and turned into instructions; one subclass for each kind of operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from tvm_structured.errors import VTAError
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.builder import Builder
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.operators.base import Weighted


class Problem(ABC):
    """An operator with input shapes on one accelerator."""

    name: str
    config: VTAConfig
    reason: str = ""

    @abstractmethod
    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        """All worth a try that fit the buffers, best estimate first; at least one unless nothing fits."""

    @abstractmethod
    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        """Instructions from the regions `sources` to the region `target`. Raises VTAError if `s` does not fit."""

    def default_schedule(self, threads: int = 2) -> Schedule:
        """The best estimate; with one thread where two do not fit. Raises VTAError where nothing fits."""
        for count in (threads, 1):
            for schedule in self.schedules(count):
                return schedule
        raise VTAError(f"{self.name}: no tile fits the buffers of {self.config}; use larger buffers")

    def check_fits(self, fits: bool, s: Schedule) -> None:
        if not fits:
            raise VTAError(f"{self.name}: {s} does not fit the buffers; leave the schedule to the compiler")


def check_values(config: VTAConfig, layer: Weighted) -> None:
    """Raise VTAError for weights or results that the accelerator's widths do not hold."""
    limit = 1 << (config.wgt_bits - 1)
    if not -limit <= int(layer.weight.min()) <= int(layer.weight.max()) < limit:
        raise VTAError(f"{layer.name}: its weights need more than the {config.wgt_bits} bits of this accelerator")
    check_clip(config, layer.name, layer.requantize.low, layer.requantize.high)
    if layer.residual is not None:
        check_acc_8bit(config, layer.name, "a residual")


def check_clip(config: VTAConfig, name: str, low: int, high: int) -> None:
    limit = 1 << (config.out_bits - 1)
    if low < -limit or high >= limit:
        raise VTAError(
            f"{name}: clips to {low}..{high}, but results have {config.out_bits} bits; clip to {-limit}..{limit - 1}"
        )


def check_acc_8bit(config: VTAConfig, name: str, what: str) -> None:
    if not config.has_acc_8bit:
        raise VTAError(f"{name}: {what} needs 8-bit inputs; this accelerator has {config.inp_bits} bits")
