"""The order in which the three modules execute a stream.

Each module runs its instructions in order; they wait for each other through four token counters only. An instruction
takes all its tokens, executes, then pushes. The k-th pop of a counter needs the k-th push (tokens left by an earlier
run come first), so what must come before an instruction is the same under every interleaving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import DeadlockError, FinishError, IllegalInstructionError
from tvm_structured.vta.config import Memory
from tvm_structured.vta.isa import Finish, Load, Store

MODULES = ("load", "compute", "store")
FLAGS = ("pop_prev", "pop_next", "push_prev", "push_next")
TOKENS = ("l2g", "g2l", "g2s", "s2g")
CHANNELS = (  # of each module, the token counter of each flag
    {"pop_next": 1, "push_next": 0},
    {"pop_prev": 0, "pop_next": 3, "push_prev": 1, "push_next": 2},
    {"pop_prev": 2, "push_prev": 3},
)
Tokens = tuple[int, int, int, int]
NO_TOKENS: Tokens = (0, 0, 0, 0)
Clock = tuple[int, int, int]


@dataclass(frozen=True)
class Order:
    """Stream indices in the order of execution, and the tokens that are left."""

    indices: NDArray[np.int64]
    tokens: Tokens


def modules_of(opcodes: NDArray[np.int64], memory_types: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index in MODULES of each instruction."""
    loads = (opcodes == Load.opcode) & ((memory_types == Memory.INP) | (memory_types == Memory.WGT))
    modules: NDArray[np.int64] = np.where(loads, 0, np.where(opcodes == Store.opcode, 2, 1))
    return modules


def check_flags(index: int, module: int, flags: Sequence[int]) -> None:
    """Raise IllegalInstructionError for a token flag that leads nowhere."""
    for name, flag in zip(FLAGS, flags, strict=True):
        if flag and name not in CHANNELS[module]:
            raise IllegalInstructionError(f"the {MODULES[module]} module has no such neighbour", index, name)


def execution_order(
    opcodes: Sequence[int],
    modules: Sequence[int],
    flags: Sequence[Sequence[int]],
    start: Tokens = NO_TOKENS,
    polling: Sequence[int] = (0, 1, 2),
) -> Order:
    """Run the modules on tokens alone; `polling` says which one is looked at first.

    Raises DeadlockError, or FinishError where FINISH is missing, or may be executed before other work.
    """
    if Finish.opcode not in opcodes:
        raise FinishError("the run has no FINISH; end it with one", max(len(opcodes) - 1, 0), "opcode")
    walk = _Walk(modules, flags, start)
    while any([walk.advance(module) for module in polling]):
        pass
    walk.check_complete()
    _check_finish(opcodes, modules, walk.clocks)
    return Order(np.array(walk.order, np.int64), walk.left())


class _Walk:
    """Queues and tokens; each token carries the clock of its push: how many instructions of each module precede it."""

    def __init__(self, modules: Sequence[int], flags: Sequence[Sequence[int]], start: Tokens) -> None:
        self.queues: list[deque[int]] = [deque(), deque(), deque()]
        for index, module in enumerate(modules):
            self.queues[module].append(index)
        wires = [[CHANNELS[module].get(name, 0) for name in FLAGS] for module in range(3)]
        self.pops = [[wires[m][i] for i in (0, 1) if f[i]] for m, f in zip(modules, flags, strict=True)]
        self.pushes = [[wires[m][i] for i in (2, 3) if f[i]] for m, f in zip(modules, flags, strict=True)]
        self.tokens: list[deque[Clock]] = [deque([(0, 0, 0)] * count) for count in start]
        self.now: list[Clock] = [(0, 0, 0)] * 3
        self.clocks: list[Clock] = [(0, 0, 0)] * len(modules)
        self.order: list[int] = []

    def advance(self, module: int) -> bool:
        """Execute what the module can; whether that was anything."""
        queue, tokens, before = self.queues[module], self.tokens, len(self.order)
        while queue and all(tokens[channel] for channel in self.pops[queue[0]]):
            index = queue.popleft()
            clock = self.now[module]
            for channel in self.pops[index]:
                a, b, c = tokens[channel].popleft()
                clock = (max(clock[0], a), max(clock[1], b), max(clock[2], c))
            own = clock[module] + 1
            a, b, c = clock
            clock = ((own, b, c), (a, own, c), (a, b, own))[module]
            self.now[module] = self.clocks[index] = clock
            for channel in self.pushes[index]:
                tokens[channel].append(clock)
            self.order.append(index)
        return len(self.order) > before

    def check_complete(self) -> None:
        blocked = [queue[0] for queue in self.queues if queue]
        if not blocked:
            return
        index = min(blocked)
        channel = next(channel for channel in self.pops[index] if not self.tokens[channel])
        module = next(m for m, queue in enumerate(self.queues) if queue and queue[0] == index)
        field = next(name for name, wire in CHANNELS[module].items() if wire == channel and name.startswith("pop"))
        raise DeadlockError(
            f"the {MODULES[module]} module waits for a {TOKENS[channel]} token that is never pushed "
            f"({len(self.order)} of {len(self.clocks)} instructions can be executed)",
            index,
            field,
        )

    def left(self) -> Tokens:
        l2g, g2l, g2s, s2g = (len(channel) for channel in self.tokens)
        return l2g, g2l, g2s, s2g


def _check_finish(opcodes: Sequence[int], modules: Sequence[int], clocks: Sequence[Clock]) -> None:
    """FINISH must be the last instruction under every interleaving, or the run would end with work undone."""
    finish = list(opcodes).index(Finish.opcode)
    known, seen = clocks[finish], [0, 0, 0]
    for index, module in enumerate(modules):
        seen[module] += 1
        if seen[module] > known[module]:
            raise FinishError(
                f"FINISH (instruction {finish}) does not wait for it; let FINISH pop a token that it leads to",
                index,
                "opcode",
            )
