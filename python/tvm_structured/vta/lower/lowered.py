"""A lowered operator: a program, its constants and where everything lies in DRAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import encode
from tvm_structured.vta.lower.builder import CONSTANTS, Builder, Constants
from tvm_structured.vta.lower.dependences import Draft
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.machine import PAGE
from tvm_structured.vta.operators import Operator
from tvm_structured.vta.program import Program
from tvm_structured.vta.simulator import Simulator


def aligned(nbytes: int, config: VTAConfig) -> int:
    """Rounded up to where a region may start: whole pages, and whole elements of every memory."""
    step = max(PAGE, *(config.element_bytes(memory) for memory in Memory))
    return -(-nbytes // step) * step


@dataclass(frozen=True, eq=False)
class Lowered:
    """One operator for inputs of fixed shapes.

    DRAM has the regions "input0", "input1", ..., "output", "constants" and "scratch"; `addresses` are their first
    bytes and `sizes` their bytes. A program runs again and again as long as `constants` lie in their region.
    """

    operator: Operator
    config: VTAConfig
    schedule: Schedule
    inputs: tuple[Layout, ...]
    output: Layout
    sources: tuple[Constants, ...] = field(repr=False)
    sizes: dict[str, int]
    addresses: dict[str, int]
    drafts: tuple[Draft, ...] = field(repr=False)
    offsets: dict[str, int] = field(repr=False)  # of the parts of "constants"
    reason: str = ""  # why it is lowered like this

    @classmethod
    def build(
        cls, operator: Operator, schedule: Schedule, inputs: tuple[Layout, ...], output: Layout, b: Builder,
        reason: str = "",
    ) -> Lowered:  # fmt: skip
        """From a builder that holds all instructions but the FINISH."""
        config, drafts = b.config, tuple(b.finish())
        offsets, end = {}, 0
        for memory in CONSTANTS:
            offsets[memory.name] = end
            end += aligned(b.constants[memory].nbytes, config)
        sizes = {f"input{i}": layout.nbytes for i, layout in enumerate(inputs)}
        out_bytes = config.element_bytes(Memory.OUT)
        scratch = {name: len(accesses.last) * out_bytes for name, accesses in b.scratch.items()}
        inner = 0
        for name, nbytes in scratch.items():
            offsets[name] = inner
            inner += aligned(nbytes, config)
        sizes |= {"output": output.nbytes, "constants": end, "scratch": inner}
        addresses, free = {}, aligned(PAGE, config)
        for name, nbytes in sizes.items():
            addresses[name] = free
            free += aligned(nbytes, config)
        return cls(
            operator,
            config,
            schedule,
            inputs,
            output,
            tuple(b.constants.values()),
            sizes,
            addresses,
            drafts,
            offsets,
            reason,
        )

    def placed(self, addresses: Mapping[str, int]) -> Lowered:
        """The same with regions elsewhere. Raises VTAError for an unknown region or an address that is not a multiple
        of a page and of every element."""
        for name, address in addresses.items():
            if name not in self.sizes:
                raise VTAError(f"no region {name!r}; there are {', '.join(self.sizes)}")
            if address < PAGE or address != aligned(address, self.config):
                raise VTAError(f"{name} at byte {address}: expected a multiple of {aligned(1, self.config)}, not 0")
        values = {name: value for name, value in vars(self).items() if name not in ("program", "constants")}
        return Lowered(**{**values, "addresses": {**self.addresses, **addresses}})

    @property
    def dram_bytes(self) -> int:
        """DRAM that reaches to the end of every region."""
        return max(self.addresses[name] + aligned(size, self.config) for name, size in self.sizes.items())

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """Byte ranges that the program may touch."""
        return tuple((self.addresses[name], self.addresses[name] + size) for name, size in self.sizes.items() if size)

    def _first_element(self, draft: Draft) -> int:
        """DRAM element at which the region of a transfer starts."""
        memory = Memory(draft.fields["memory_type"])
        home = draft.region if draft.region in self.addresses else ("constants", "scratch")[
            draft.region not in Memory.__members__
        ]  # fmt: skip
        address = self.addresses[home] + self.offsets.get(draft.region, 0)
        return address // self.config.element_bytes(memory)

    @cached_property
    def program(self) -> Program:
        """Checked, with all addresses."""
        instructions = []
        for draft in self.drafts:
            fields = dict(draft.fields)
            if draft.region:
                fields["dram_base"] += self._first_element(draft)
            instructions.append(draft.kind(**fields))
        return Program(self.config, encode(self.config, instructions))

    @cached_property
    def constants(self) -> NDArray[np.uint8]:
        """The bytes of the region "constants": micro-ops, weights and vectors."""
        return np.concatenate(
            [np.pad(source.raw(), (0, aligned(source.nbytes, self.config) - source.nbytes)) for source in self.sources]
        )

    def write_constants(self, dram: NDArray[np.uint8]) -> None:
        start = self.addresses["constants"]
        dram[start : start + self.constants.size] = self.constants

    def run(self, *inputs: NDArray[np.int8], simulator: Simulator | None = None, **options: Any) -> NDArray[np.int8]:
        """The operator's result, from a simulator with enough DRAM (a new one by default). `options` go to its `run`.

        Raises VTAError for inputs of other shapes, or a simulator of another configuration or with too little DRAM.
        """
        if len(inputs) != len(self.inputs):
            raise VTAError(f"{self.operator.name}: {len(inputs)} inputs; it takes {len(self.inputs)}")
        simulator = Simulator(self.config, self.dram_bytes) if simulator is None else simulator
        if len(simulator.dram) < self.dram_bytes:
            raise VTAError(f"the simulator has {len(simulator.dram)} bytes of DRAM; {self.dram_bytes} are needed")
        self.write_constants(simulator.dram)
        for i, (layout, x) in enumerate(zip(self.inputs, inputs, strict=True)):
            start = self.addresses[f"input{i}"]
            simulator.dram[start : start + layout.nbytes] = layout.pack(x)
        simulator.run(self.program, regions=self.regions, **options)
        start = self.addresses["output"]
        return self.output.unpack(simulator.dram[start : start + self.output.nbytes])
