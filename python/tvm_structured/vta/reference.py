"""A slow interpreter: instructions mean what their class in isa.py says. Written for clearness; it shares no
execution, ordering or checking code with the simulator, which is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_structured.errors import DeadlockError, FinishError, IllegalInstructionError, VTAError
from tvm_structured.vta.bits import Words
from tvm_structured.vta.config import Memory
from tvm_structured.vta.isa import Finish, Instruction, Load, Store, decode
from tvm_structured.vta.machine import Machine


def interpret(machine: Machine, words: Words, polling: Sequence[int] = (0, 1, 2)) -> None:
    """One run, modules polled in the order of priority that `polling` gives; it starts and must end without tokens.

    Raises the VTAError of the first thing that goes wrong.
    """
    queues: list[list[tuple[int, Instruction]]] = [[], [], []]
    for index, pair in enumerate(words):
        try:
            instruction = decode(machine.config, pair)
        except VTAError as error:
            raise error.at(index) from None
        queues[module_of(index, instruction)].append((index, instruction))
    tokens = {"l2g": 0, "g2l": 0, "g2s": 0, "s2g": 0}
    last: Instruction | None = None
    while any(queues):
        ready = [module for module in polling if queues[module] and is_ready(module, queues[module][0][1], tokens)]
        if not ready:
            raise DeadlockError("no module can go on", min(queue[0][0] for queue in queues if queue), "pop_prev")
        index, last = queues[ready[0]].pop(0)
        take(ready[0], last, tokens)
        try:
            last.execute(machine)
        except VTAError as error:
            raise error.at(index) from None
        if isinstance(last, Finish) and any(queues):
            raise FinishError("instructions are left", index, "opcode")
        give(ready[0], last, tokens)
    if not isinstance(last, Finish):
        raise FinishError("no FINISH", len(words), "opcode")


def module_of(index: int, instruction: Instruction) -> int:
    """0 load, 1 compute, 2 store. Raises IllegalInstructionError for a token flag that leads nowhere."""
    if isinstance(instruction, Load) and instruction.memory_type in (Memory.INP, Memory.WGT):
        if instruction.pop_prev or instruction.push_prev:
            raise IllegalInstructionError("load has no previous module", index, "pop_prev")
        return 0
    if isinstance(instruction, Store):
        if instruction.pop_next or instruction.push_next:
            raise IllegalInstructionError("store has no next module", index, "pop_next")
        return 2
    return 1


PREVIOUS_POP, NEXT_POP = ("", "l2g", "g2s"), ("g2l", "s2g", "")
PREVIOUS_PUSH, NEXT_PUSH = ("", "g2l", "s2g"), ("l2g", "g2s", "")


def is_ready(module: int, instruction: Instruction, tokens: dict[str, int]) -> bool:
    previous = not instruction.pop_prev or tokens[PREVIOUS_POP[module]] > 0
    return previous and (not instruction.pop_next or tokens[NEXT_POP[module]] > 0)


def take(module: int, instruction: Instruction, tokens: dict[str, int]) -> None:
    if instruction.pop_prev:
        tokens[PREVIOUS_POP[module]] -= 1
    if instruction.pop_next:
        tokens[NEXT_POP[module]] -= 1


def give(module: int, instruction: Instruction, tokens: dict[str, int]) -> None:
    if instruction.push_prev:
        tokens[PREVIOUS_PUSH[module]] += 1
    if instruction.push_next:
        tokens[NEXT_PUSH[module]] += 1


def same_state(a: Machine, b: Machine) -> list[str]:
    """Names of what differs between two machines."""
    differing = [
        name for name in ("uop", "wgt", "inp", "acc", "dram") if not np.array_equal(vars(a)[name], vars(b)[name])
    ]
    return differing + [name for name in a.counters if a.counters[name] != b.counters[name]]
