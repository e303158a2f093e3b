"""Tokens where they are needed: the three modules wait for each other exactly where one uses what another made.

Instructions come in an order that would be right one by one; each names the instructions of other modules that must
come before it. A token is added unless what is already waited for implies it, so any interleaving gives one result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory
from tvm_structured.vta.isa import Instruction, Load

LOAD, COMPUTE, STORE = range(3)
Need = tuple[int, int]  # module, and the number of its instructions that must be done
PUSHES = {(LOAD, COMPUTE): "push_next", (COMPUTE, LOAD): "push_prev", (COMPUTE, STORE): "push_next",
          (STORE, COMPUTE): "push_prev"}  # fmt: skip
POPS = {(LOAD, COMPUTE): "pop_prev", (COMPUTE, LOAD): "pop_next", (COMPUTE, STORE): "pop_prev",
        (STORE, COMPUTE): "pop_next"}  # fmt: skip


@dataclass
class Draft:
    """An instruction whose tokens, and whose place in DRAM, are still open."""

    kind: type[Instruction]
    fields: dict[str, int]
    region: str = ""  # of dram_base, which counts from its start


@dataclass
class Queue:
    """One module: its instructions, and after each how many of every module are known to be done."""

    drafts: list[Draft] = field(default_factory=list)
    clocks: list[tuple[int, int, int]] = field(default_factory=list)
    now: tuple[int, int, int] = (0, 0, 0)


class Dependences:
    """Collects instructions and adds their tokens."""

    def __init__(self) -> None:
        self.stream: list[Draft] = []
        self.queues = (Queue(), Queue(), Queue())

    def done(self, module: int) -> Need:
        """All of a module's instructions so far."""
        return module, len(self.queues[module].drafts)

    def add(self, module: int, draft: Draft, needs: Iterable[Need]) -> int:
        """Append; returns how many instructions the module has."""
        latest = [0, 0, 0]
        for producer, number in needs:
            latest[producer] = max(latest[producer], number)
        if module == LOAD and latest[STORE] > self.queues[LOAD].now[STORE]:
            # no token leads from store to load: a no-op of the compute module passes it on
            relay = Draft(Load, {"memory_type": Memory.UOP})
            latest[COMPUTE] = max(latest[COMPUTE], self.add(COMPUTE, relay, [(STORE, latest[STORE])]))
        queue = self.queues[module]
        for producer in (LOAD, COMPUTE, STORE):
            if (producer, module) in PUSHES and latest[producer] > queue.now[producer]:
                self._wait(module, draft, producer, latest[producer])
        clock = list(queue.now)
        clock[module] += 1
        queue.now = (clock[0], clock[1], clock[2])
        queue.clocks.append(queue.now)
        queue.drafts.append(draft)
        self.stream.append(draft)
        return len(queue.drafts)

    def _wait(self, module: int, draft: Draft, producer: int, number: int) -> None:
        source, queue = self.queues[producer], self.queues[module]
        source.drafts[number - 1].fields[PUSHES[producer, module]] = 1
        draft.fields[POPS[producer, module]] = 1
        a, b = queue.now, source.clocks[number - 1]
        queue.now = (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))


class Accesses:
    """For each element of a buffer, the last instruction of one module that touched it."""

    def __init__(self, depth: int) -> None:
        self.last: NDArray[np.int64] = np.zeros(depth, np.int64)

    def latest(self, first: int, end: int) -> int:
        return int(self.last[first:end].max(initial=0))

    def touch(self, first: int, end: int, number: Any) -> None:
        self.last[first:end] = number
