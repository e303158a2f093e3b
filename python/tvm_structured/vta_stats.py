"""What runs on the accelerator counted, and what its layers cost by the timing model. Needs only TVM's runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvm_structured.errors import ModelError

COUNTED = "main_counted"  # the function that gives the results and the counters of every region


@dataclass(frozen=True)
class VTALayer:
    """One program. Counts are those of one run: bytes by memory, micro-ops of GEMM and ALU; `cycles` are modelled, and
    None where there is no model. `reason`: how it was lowered, and why."""

    layer: str
    operator: str
    region: int
    instructions: int
    counters: dict[str, int]
    cycles: int | None = None
    reason: str = ""

    @property
    def utilisation(self) -> float | None:
        """Share of the modelled cycles in which a GEMM micro-op is executed."""
        return self.counters["gemm_counter"] / self.cycles if self.cycles else None


@dataclass(frozen=True)
class VTAStats:
    """`counters` are the sums of `runs` runs, counted by the simulator; `layers` are programs in order."""

    runs: int
    counters: dict[str, int]
    layers: tuple[VTALayer, ...]

    @property
    def cycles(self) -> int | None:
        """Modelled cycles of one run, layer after layer."""
        known = [layer.cycles for layer in self.layers if layer.cycles is not None]
        return sum(known) if len(known) == len(self.layers) else None

    @property
    def utilisation(self) -> float | None:
        """Share of the modelled cycles of a run in which a GEMM micro-op is executed."""
        return sum(layer.counters["gemm_counter"] for layer in self.layers) / self.cycles if self.cycles else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cycles": self.cycles, "utilisation": self.utilisation}

    def __str__(self) -> str:
        from tvm_structured.report import plain_text

        return plain_text(self)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title="programs of the accelerator, one run", box=box.SIMPLE_HEAD, title_justify="left")
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if index < 2 else "right")
        for layer in self.layers:
            table.add_row(*cells(layer.layer, layer.operator, layer.counters, layer.cycles, layer.utilisation))
        table.add_section()
        total = {name: sum(layer.counters[name] for layer in self.layers) for name in self.counters}
        table.add_row(*cells("total", "", total, self.cycles, self.utilisation))
        counted = ", ".join(f"{name} {value:,}" for name, value in self.counters.items())
        table.caption = f"{self.runs} runs counted: {counted}" if self.runs else "no run was counted yet"
        table.caption_justify = "left"
        return table


HEADINGS = (
    "layer",
    "operator",
    "inp B",
    "wgt B",
    "acc B",
    "uop B",
    "out B",
    "GEMM",
    "ALU",
    "cycles (model)",
    "of peak",
)


def cells(
    layer: str, operator: str, counters: Mapping[str, int], cycles: int | None, utilisation: float | None
) -> list[str]:
    counted = [f"{value:,}" for value in counters.values()]
    share = "-" if utilisation is None else f"{100 * utilisation:.1f} %"
    return [layer, operator, *counted, "-" if cycles is None else f"{cycles:,}", share]


class CountedMain:
    """`main` of a module with regions on the accelerator; adds up what they count."""

    def __init__(self, vm: Any, described: Mapping[str, Any]) -> None:
        self._main = vm[COUNTED]
        self.names = tuple(described["counters"])
        self.layers = tuple(VTALayer(**layer) for layer in described["layers"])
        self.clear()

    def clear(self) -> None:
        self.runs, self.totals = 0, np.zeros(len(self.names), np.int64)

    def __call__(self, *arrays: Any) -> Any:
        outputs, regions = self._main(*arrays)
        self.runs += 1
        for counters in regions:
            self.totals += counters.numpy()
        return outputs

    def stats(self) -> VTAStats:
        counters = {name: int(value) for name, value in zip(self.names, self.totals, strict=True)}
        return VTAStats(self.runs, counters, self.layers)


def counted_main(main: Any) -> CountedMain:
    """Raises ModelError for a module without regions."""
    if not isinstance(main, CountedMain):
        raise ModelError('nothing of this module runs on the accelerator; compile with target="vta"')
    return main
