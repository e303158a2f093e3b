"""Random and damaged programs: the simulator must agree with the meaning of the instructions, or refuse.

    python -m tvm_structured.vta.fuzz --count 10000 --seed 0

Each case builds a program that is valid by construction, or damages one (bits, fields, order, lengths), and runs it
on the simulator and on the reference. Both must accept it, with equal memory, buffers and counters, or both must
refuse it; and the simulator must work afterwards.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import numpy as np

from tvm_structured.errors import VTAError
from tvm_structured.vta.bits import Words
from tvm_structured.vta.checks import columns_of, iterations
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.golden import POLLINGS
from tvm_structured.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store, encode
from tvm_structured.vta.machine import PAGE, Machine
from tvm_structured.vta.reference import interpret, same_state
from tvm_structured.vta.simulator import Simulator

TINY = VTAConfig(log_uop_buff_size=8, log_inp_buff_size=10, log_wgt_buff_size=12, log_acc_buff_size=12)
CONFIGS = (
    TINY,
    replace(TINY, log_batch=1),
    replace(TINY, log_block=3, log_batch=2),
    replace(TINY, log_block=5),
    replace(TINY, log_inp_width=2, log_wgt_width=2),
)
DRAM_BYTES = 1 << 15
MOST_ITERATIONS = 20_000  # of one program; the reference is slow


class Generator:
    """Random instructions of one configuration."""

    def __init__(self, config: VTAConfig, rng: np.random.Generator) -> None:
        self.config = config
        self.rng = rng

    def upto(self, largest: int) -> int:
        return int(self.rng.integers(0, max(0, largest) + 1))

    def load(self, memory: Memory) -> Load:
        depth, size = self.config.depth(memory), self.config.element_bytes(memory)
        pads = {name: self.upto(2) for name in ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")}
        if self.upto(1) or memory is Memory.UOP:
            pads = dict.fromkeys(pads, 0)
        x_size, y_size, stride = 1 + self.upto(5), self.upto(3), self.upto(7)
        count = (pads["x_pad_0"] + x_size + pads["x_pad_1"]) * (pads["y_pad_0"] + y_size + pads["y_pad_1"])
        if count > depth:
            return self.load(memory)
        last = DRAM_BYTES // size - (max(y_size - 1, 0) * stride + x_size)
        first = -(-PAGE // size)
        if last < first:
            return self.load(memory)
        return Load(
            memory_type=memory,
            sram_base=self.upto(depth - count),
            dram_base=first + self.upto(last - first),
            x_size=x_size,
            y_size=y_size,
            x_stride=stride,
            **pads,
        )

    def store(self) -> Store:
        size, depth = self.config.element_bytes(Memory.OUT), self.config.depth(Memory.OUT)
        x_size, y_size, stride = 1 + self.upto(3), self.upto(3), self.upto(5)
        first = -(-PAGE // size)
        last = DRAM_BYTES // size - (max(y_size - 1, 0) * stride + x_size)
        return Store(
            memory_type=Memory.OUT,
            sram_base=self.upto(depth - x_size * y_size),
            dram_base=first + self.upto(last - first),
            x_size=x_size,
            y_size=y_size,
            x_stride=stride,
        )

    def loops(self) -> dict[str, int]:
        depth = self.config.depth(Memory.UOP)
        begin = self.upto(depth - 1)
        end = min(depth, begin + self.upto(6))
        strides = {name: self.upto(1) for name in ("dst_out", "dst_in", "src_out", "src_in")}
        return {"uop_bgn": begin, "uop_end": end, "iter_out": self.upto(3), "iter_in": self.upto(4), **strides}

    def compute(self) -> Instruction:
        choice = self.upto(4)
        if choice < 2:
            more = {"wgt_out": self.upto(1), "wgt_in": self.upto(1)}
            return Gemm(reset=int(self.upto(5) == 0), **self.loops(), **more)
        if choice < 4:
            imm = self.upto(65535) - 32768 if self.upto(1) else self.upto(70) - 35
            return Alu(alu_opcode=self.upto(4), use_imm=self.upto(1), imm=imm, **self.loops())
        loadable = [Memory.UOP, Memory.ACC] + [Memory.ACC_8BIT] * self.config.has_acc_8bit
        return self.load(loadable[self.upto(len(loadable) - 1)])

    def stream(self) -> list[Instruction]:
        """Rounds of loads, computation and stores in turns, so that no two modules race."""
        program: list[Instruction] = []
        for _ in range(1 + self.upto(3)):
            loads: list[Instruction] = [
                self.load((Memory.INP, Memory.WGT)[self.upto(1)]) for _ in range(1 + self.upto(2))
            ]
            computes = [self.compute() for _ in range(1 + self.upto(4))]
            stores: list[Instruction] = [self.store() for _ in range(1 + self.upto(1))]
            loads[0] = replace(loads[0], pop_next=int(bool(program)))
            loads[-1] = replace(loads[-1], push_next=1)
            computes[0] = replace(computes[0], pop_prev=1, pop_next=int(bool(program)))
            computes[-1] = replace(computes[-1], push_next=1)
            stores[0] = replace(stores[0], pop_prev=1)
            stores[-1] = replace(stores[-1], push_prev=1)
            program += [*loads, *computes, *stores]
            # the next loads wait for what this round stored: a no-op passes the token on
            program += [Load(pop_next=1, push_prev=1, push_next=1), Store(pop_prev=1, push_prev=1)]
        return [*program, Load(memory_type=Memory.INP, pop_next=1, push_next=1), Finish(pop_prev=1, pop_next=1)]


def damaged(words: Words, rng: np.random.Generator) -> Words:
    """A copy with one kind of damage."""
    words = words.copy()
    kind, index = int(rng.integers(6)), int(rng.integers(len(words)))
    if kind < 2:  # some bits
        for _ in range(int(rng.integers(1, 4))):
            words[index, rng.integers(2)] ^= np.uint64(1) << np.uint64(rng.integers(64))
    elif kind == 2:
        words[index] = rng.integers(0, 1 << 64, 2, np.uint64)
    elif kind == 3:
        words = np.delete(words, index, axis=0)
    elif kind == 4:
        other = int(rng.integers(len(words)))
        words[[index, other]] = words[[other, index]]
    else:
        words = np.insert(words, index, words[rng.integers(len(words))], axis=0)
    return words


def micro_ops(config: VTAConfig, rng: np.random.Generator) -> Machine:
    """A machine with random memory; many of its words are micro-ops with small indices."""
    dram = rng.integers(0, 256, DRAM_BYTES).astype(np.uint8)
    shifts = np.cumsum((0, *config.uop_widths[:2]))
    words = sum(rng.integers(0, 6, DRAM_BYTES // 8) << int(shift) for shift in shifts)
    dram[: DRAM_BYTES // 2] = np.asarray(words, np.uint32).view(np.uint8)
    return Machine(config, dram)


class Fuzzer:
    """Simulators of all configurations, and a tally of what happened."""

    def __init__(self, seed: int, target: object = "host") -> None:
        self.rng = np.random.default_rng(seed)
        self.simulators = [Simulator(config, DRAM_BYTES, target) for config in CONFIGS]
        self.tally: Counter[str] = Counter()

    def case(self) -> None:
        """One program. Raises AssertionError, with its listing, where simulator and reference disagree."""
        simulator = self.simulators[int(self.rng.integers(len(CONFIGS)))]
        words = encode(simulator.config, Generator(simulator.config, self.rng).stream())
        if self.rng.integers(2):
            words = damaged(words, self.rng)
        columns = columns_of(simulator.config, words)
        if int(np.maximum(iterations(columns), 0).sum()) > MOST_ITERATIONS:
            self.tally["too long for the reference"] += 1
            return
        skip = bool(self.rng.integers(8) == 0)
        self.compare(simulator, words, skip)

    def compare(self, simulator: Simulator, words: Words, skip: bool) -> None:
        machine = micro_ops(simulator.config, self.rng)
        machine.skip_execution = skip
        simulator.reset()
        simulator.dram[:] = machine.dram
        refused = outcome = None
        try:
            simulator.run(words, skip_execution=skip)
        except VTAError as error:
            refused = error
        try:
            for polling in POLLINGS if refused is not None else POLLINGS[:1]:
                fresh = copy_of(machine)
                interpret(fresh, words, polling)
            outcome = fresh
        except VTAError as error:
            self.tally[type(refused or error).__name__] += 1
            assert refused is not None, f"only the reference refuses: {error}\n{words!r}"
            assert refused.instruction is not None and refused.field, f"no place in {refused}"
            return
        assert refused is None, f"only the simulator refuses: {refused}\n{words!r}"
        assert outcome is not None
        wrong = same_state(outcome, state_of(simulator))
        if wrong and self.is_racy(machine, words):
            self.tally["racy"] += 1
            return
        assert not wrong, f"differs in {wrong}, skip={skip}\n{simulator.config}\n{words!r}"
        self.tally["equal"] += 1

    def is_racy(self, machine: Machine, words: Words) -> bool:
        """Whether the meaning itself depends on which module goes first, so that there is no right result."""
        first, *others = [copy_of(machine) for _ in POLLINGS]
        interpret(first, words, POLLINGS[0])
        for other, polling in zip(others, POLLINGS[1:], strict=True):
            interpret(other, words, polling)
        return any(same_state(first, other) for other in others)


def copy_of(machine: Machine) -> Machine:
    return Machine(machine.config, machine.dram.copy(), None, machine.skip_execution)


def state_of(simulator: Simulator) -> Machine:
    """The simulator's state as the reference keeps it."""
    machine = Machine(simulator.config, simulator.dram)
    machine.uop[:] = simulator.sram(Memory.UOP)
    machine.acc[:] = simulator.sram(Memory.ACC).reshape(machine.acc.shape)
    for memory in (Memory.WGT, Memory.INP):
        raw, buffer = simulator.sram(memory), machine.buffer(memory)
        buffer[:] = machine.read_packed(memory, raw).reshape(buffer.shape)
    machine.counters = simulator.counters
    return machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the simulator against the meaning of the instructions.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--portable", action="store_true", help="without vector extensions")
    options = parser.parse_args()
    fuzzer = Fuzzer(options.seed, {"kind": "llvm"} if options.portable else "host")
    for _ in range(options.count):
        fuzzer.case()
    for name, count in fuzzer.tally.most_common():
        print(f"{count:8d} {name}")


if __name__ == "__main__":
    main()
