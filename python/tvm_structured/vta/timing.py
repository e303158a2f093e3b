"""Modelled cycles of a program: an event simulation of the fetch unit, three modules, their tokens and one read port.

    timing = model(program)
    timing.cycles, timing.gemm_utilisation, timing.busy

The constants describe the published hardware (fill and drain of the pipelines, bursts, one AXI port); some are
estimates and none was compared with a board or a cycle-accurate run: they compare programs, they promise nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import DeadlockError, VTAError
from tvm_structured.vta.checks import Columns, addresses, iterations
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import Alu, Finish, Gemm, Load, Store
from tvm_structured.vta.order import CHANNELS, FLAGS, MODULES, modules_of
from tvm_structured.vta.program import Program

Cycles = NDArray[np.int64]


@dataclass(frozen=True)
class TimingModel:
    """Constants of the model, in cycles unless said otherwise.

    The default has the 64-bit port and the bursts of 256 beats of the Pynq design; `burst_beats=16` are those of the
    cycle-accurate simulator. A first read waits `read_latency`; a burst costs `burst_gap` more than its beats.
    """

    bus_bytes: int = 8
    burst_beats: int = 256
    queue: int = 512  # instructions that wait in front of a module
    pipeline: int = 8  # fill and drain of GEMM and ALU
    idle: int = 2  # an instruction that only moves tokens
    load_start: int = 4
    read_latency: int = 16
    burst_gap: int = 2
    hidden_padding: int = 16  # elements zeroed while the first beats are awaited
    store_start: int = 2
    store_burst: int = 6

    def __post_init__(self) -> None:
        if min(self.bus_bytes, self.burst_beats, self.queue) < 1 or self.burst_beats < 2:
            raise VTAError(f"{self}: bus_bytes, burst_beats and queue must be at least 1, a burst has 2 beats or more")


@dataclass(frozen=True, eq=False)
class Timing:
    """Modelled times of one run; arrays have one entry for each instruction of the stream.

    `module`: 0 load, 1 compute, 2 store. `gemm_micro_ops` counts products, not resets.
    """

    cycles: int
    module: NDArray[np.int64]
    start: Cycles
    end: Cycles
    gemm_micro_ops: int
    read_busy: int  # cycles in which the read port is taken

    @property
    def busy(self) -> dict[str, int]:
        """Modelled cycles in which each module executes something."""
        spent = self.end - self.start
        return {name: int(spent[self.module == index].sum()) for index, name in enumerate(MODULES)}

    @property
    def gemm_utilisation(self) -> float:
        """Share of the modelled cycles in which the GEMM core does a product."""
        return self.gemm_micro_ops / self.cycles if self.cycles else 0.0


def model(program: Program, constants: TimingModel | None = None) -> Timing:
    """Modelled cycles of a program that starts without tokens. Raises VTAError where it cannot run to its end, also
    where a module's queue is too short for the order of the stream."""
    constants = TimingModel() if constants is None else constants
    program.order()  # a fault of the stream is reported as everywhere else
    return _Events(program, constants).run()


def parts_of(config: VTAConfig, c: Columns, m: TimingModel) -> tuple[Cycles, Cycles, Cycles]:
    """Of each instruction, cycles before it needs the read port, on the read port, and after it."""
    opcode = c["opcode"]
    before, port, after = (np.full(len(opcode), value, np.int64) for value in (0, 0, m.idle))
    count = np.maximum(iterations(c), 0)
    for kind, each in ((Gemm, 1), (Alu, np.where(c["use_imm"] != 0, 1, 2))):
        works = (opcode == kind.opcode) & (count > 0)
        after[works] = (count * each)[works] + m.pipeline
    moves = c["x_size"] != 0
    beats, bursts = _beats_and_bursts(config, c, m)
    load = (opcode == Load.opcode) & moves
    width, height = c["x_pad_0"] + c["x_size"] + c["x_pad_1"], c["y_pad_0"] + c["y_size"] + c["y_pad_1"]
    padding = width * height - c["x_size"] * c["y_size"]
    after[load] = 0
    before[load] = m.load_start + m.read_latency
    port[load] = (beats + m.burst_gap * np.maximum(bursts - 1, 0))[load]
    after[load] = np.maximum(padding - m.hidden_padding, 0)[load]
    store = (opcode == Store.opcode) & moves
    element = -(-config.element_bytes(Memory.OUT) // m.bus_bytes) + 1  # one cycle reads the buffer
    after[store] = (m.store_start + m.store_burst * bursts + element * c["x_size"] * c["y_size"])[store]
    return before, port, after


def _beats_and_bursts(config: VTAConfig, c: Columns, m: TimingModel) -> tuple[Cycles, Cycles]:
    """Of each transfer, over all its rows; a burst does not cross a multiple of its longest size."""
    first, element = addresses(config, c)
    rows = np.where(c["x_size"] != 0, c["y_size"], 0)
    of = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(of)) - np.repeat(np.cumsum(rows) - rows, rows)
    begin = first[of] + row * (c["x_stride"] * element)[of]
    nbytes = (c["x_size"] * element)[of]
    longest = m.bus_bytes * m.burst_beats
    beats = np.bincount(of, -(-nbytes // m.bus_bytes), len(rows))
    bursts = np.bincount(of, -(-(begin % longest + nbytes) // longest), len(rows))
    return beats.astype(np.int64), bursts.astype(np.int64)


class _Events:
    """The simulation. Whatever can start first is started; loads and fetches share the read port in that order."""

    def __init__(self, program: Program, m: TimingModel) -> None:
        c = program.columns
        self.m, self.count = m, len(program)
        self.module: NDArray[np.int64] = modules_of(c["opcode"], c["memory_type"])
        self.modules: list[int] = self.module.tolist()
        before, port, after = parts_of(program.config, c, m)
        self.parts: list[tuple[int, int, int]] = list(zip(before.tolist(), port.tolist(), after.tolist(), strict=True))
        flags = np.stack([c[name] for name in FLAGS], axis=1).tolist()
        wires = [[CHANNELS[module].get(name, 0) for name in FLAGS] for module in range(3)]
        self.pops = [[wires[k][i] for i in (0, 1) if f[i]] for k, f in zip(self.modules, flags, strict=True)]
        self.pushes = [[wires[k][i] for i in (2, 3) if f[i]] for k, f in zip(self.modules, flags, strict=True)]
        works = (c["opcode"] == Gemm.opcode) & (c["reset"] == 0)
        self.gemm = int(np.maximum(iterations(c), 0)[works].sum())
        self.finish = int(np.flatnonzero(c["opcode"] == Finish.opcode)[-1])
        self.queues: list[deque[tuple[int, int]]] = [deque(), deque(), deque()]  # fetched: (instruction, cycle)
        self.started: list[list[int]] = [[], [], []]
        self.fetched_of = [0, 0, 0]
        self.tokens: list[deque[int]] = [deque() for _ in range(4)]
        self.free = [0, 0, 0]
        self.port_free = self.port_busy = 0
        self.fetched = 0
        self.filled = 0  # instructions that the fetch unit holds or has handed on
        self.fetch_time = 0
        self.start, self.end = np.zeros(self.count, np.int64), np.zeros(self.count, np.int64)

    def run(self) -> Timing:
        executed = 0
        while executed < self.count:
            ready = min(((self._start_of(k), k) for k in range(3) if self._is_ready(k)), default=None)
            fetch = self._fetch_at()
            if fetch is not None and (ready is None or fetch <= ready[0]):
                self._fetch(fetch)
            elif ready is not None:
                self._execute(*ready)
                executed += 1
            else:
                raise DeadlockError(
                    f"a module's queue of {self.m.queue} instructions is full, and what it waits for comes later in "
                    "the stream; bring instructions that work together closer to each other",
                    self.fetched,
                )
        return Timing(int(self.end[self.finish]), self.module, self.start, self.end, self.gemm, self.port_busy)

    def _fetch_at(self) -> int | None:
        """When the fetch unit goes on: fills its burst, or hands one instruction on; None if a queue is full."""
        if self.fetched == self.count:
            return None
        if self.fetched == self.filled:
            return self.fetch_time
        module = self.modules[self.fetched]
        leaves = self.fetched_of[module] - self.m.queue  # whose place it takes
        if leaves < 0:
            return self.fetch_time
        started = self.started[module]
        return max(self.fetch_time, started[leaves]) if leaves < len(started) else None

    def _fetch(self, now: int) -> None:
        if self.fetched == self.filled:
            chunk = min(self.m.burst_beats // 2, self.count - self.filled)
            begin = max(now + self.m.load_start + self.m.read_latency, self.port_free)
            self.fetch_time = self.port_free = begin + 2 * chunk
            self.port_busy += 2 * chunk
            self.filled += chunk
            return
        module = self.modules[self.fetched]
        self.fetch_time = now + 1
        self.queues[module].append((self.fetched, self.fetch_time))
        self.fetched_of[module] += 1
        self.fetched += 1

    def _is_ready(self, module: int) -> bool:
        queue = self.queues[module]
        return bool(queue) and all(self.tokens[channel] for channel in self.pops[queue[0][0]])

    def _start_of(self, module: int) -> int:
        index, fetched = self.queues[module][0]
        waits = [self.tokens[channel][0] for channel in self.pops[index]]
        start: int = max(self.free[module], fetched, *waits)
        return start

    def _execute(self, start: int, module: int) -> None:
        index, _ = self.queues[module].popleft()
        for channel in self.pops[index]:
            self.tokens[channel].popleft()
        before, port, after = self.parts[index]
        now = start + before
        if port:
            now = max(now, self.port_free)
            self.port_free = now = now + port
            self.port_busy += port
        self.start[index], self.end[index] = start, now + after
        self.free[module] = now + after
        self.started[module].append(start)
        for channel in self.pushes[index]:
            self.tokens[channel].append(now + after)
