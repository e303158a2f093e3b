"""The roofline of this machine: what no kernel can exceed (Williams, Waterman and Patterson 2009).

Measured once with all threads that TVM uses and kept beside the measured costs: the multiply-adds a second that
registers alone allow, and the bytes a second of sums over arrays of several sizes, from one that lies in the second
level of cache to one in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.files import atomic
from tvm_structured.line_store import cache_directory
from tvm_structured.targets import host_cpu, physical_cores, resolve_target, use_all_cores

SIZES = tuple(mebi << 20 for mebi in (1, 8, 64, 512))  # of arrays; the last one is larger than most caches
READ_BYTES = 128 << 20  # at least, by each run over an array
STEPS = 1 << 17  # of the register kernel, a few milliseconds
CHAINS = 12  # independent sums: latency 4, two units; leaves registers for the factors where there are 16
REPEAT = 7


@dataclass(frozen=True)
class Roofline:
    """`peak_flops`: operations a second, a multiply-add is two. `bandwidths`: (bytes of an array, bytes a second that
    are read from one of that size), by size."""

    peak_flops: float
    bandwidths: tuple[tuple[int, float], ...]

    @classmethod
    def from_dict(cls, described: Any) -> Roofline:
        """What `asdict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        pairs = tuple((int(size), float(rate)) for size, rate in described["bandwidths"])
        found = cls(float(described["peak_flops"]), pairs)
        if not pairs or min(found.peak_flops, *(rate for _, rate in pairs)) <= 0:
            raise ValueError(f"{described}: a roofline's values are above zero")
        return found

    @classmethod
    def highest(cls, several: Iterable[Roofline]) -> Roofline:
        """Each value's highest: what else the processor did made the others lower. What is read from a large array
        can be read from a smaller one."""
        found = list(several)
        rates = [max(each) for each in zip(*([rate for _, rate in one.bandwidths] for one in found), strict=True)]
        rates = [max(rates[i:]) for i in range(len(rates))]
        sizes = [size for size, _ in found[0].bandwidths]
        return cls(max(one.peak_flops for one in found), tuple(zip(sizes, rates, strict=True)))

    def bandwidth(self, moved: float) -> float:
        """Bytes a second of so many that are read over and over."""
        return next((rate for size, rate in self.bandwidths if moved <= size), self.memory_bandwidth)

    def in_cache(self, moved: float) -> bool:
        """Whether so many bytes count as read from a cache; the largest size stands for memory."""
        return any(moved <= size for size, _ in self.bandwidths[:-1])

    @property
    def memory_bandwidth(self) -> float:
        return self.bandwidths[-1][1]

    def bound(self, flops: float, moved: float) -> float:
        """Seconds that the operations or the bytes take at least, whichever is longer."""
        return max(flops / self.peak_flops, moved / self.bandwidth(moved))

    def fraction_of_bound(self, flops: float, moved: float, seconds: float) -> float:
        """max(flops / peak, bytes / bandwidth) / seconds: 1 is as fast as the machine allows."""
        return self.bound(flops, moved) / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:,.0f} of {size >> 20} MiB" for size, rate in self.bandwidths)
        return f"{self.peak_flops / 1e9:,.0f} GFLOP/s, GB/s {rates}"


def roofline(measure: bool = True, again: bool = False) -> Roofline | None:
    """The stored roofline of this machine; where there is none, a new one (about two seconds), or None.

    `again` measures in any case and keeps the higher values: the first time other work may have gone on.
    """
    path, key = store_path(), machine_key()
    known = read_store(path)
    found = parse(known.get(key))
    if not again and (found is not None or not measure):
        return found
    found = Roofline.highest([measure_roofline(), *([] if found is None else [found])])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps({**known, key: asdict(found)}, indent=2) + "\n", encoding="utf-8")
    except OSError:  # a directory that cannot be written is no error, as for costs
        pass
    return found


def store_path() -> Path:
    return cache_directory() / "roofline.json"


def machine_key() -> str:
    """What a roofline depends on."""
    import tvm

    return f"{host_cpu()}, {physical_cores()} threads, TVM {tvm.__version__}"


def read_store(path: Path) -> dict[str, Any]:
    """Rooflines by machine; a damaged file counts as an empty one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def parse(described: Any) -> Roofline | None:
    try:
        found = Roofline.from_dict(described)
    except (KeyError, TypeError, ValueError):
        return None
    return found if [size for size, _ in found.bandwidths] == list(SIZES) else None


def measure_roofline() -> Roofline:
    """The best of several runs of each kernel: a bound, not a typical value."""
    use_all_cores()
    target, cores = resolve_target("host"), physical_cores()
    registers, flops = register_func(target, cores)
    peak = flops / fastest(registers, target, [factors(), np.zeros((cores, 16), np.float32)])
    rates = []
    for size in SIZES:
        passes = max(1, READ_BYTES // size)
        vectors = max(1, size // 4 // (16 * CHAINS * cores))
        array = np.ones((cores, vectors, 16 * CHAINS), np.float32)
        stream = stream_func(target, array.shape, passes)
        seconds = fastest(stream, target, [array, np.zeros((cores, 16), np.float32)])
        rates.append(passes * array.nbytes / seconds)
    return Roofline.highest([Roofline(peak, tuple(zip(SIZES, rates, strict=True)))])


def factors() -> np.ndarray:
    """x <- a x + b with a fixed point near 1, so that nothing overflows or becomes denormal."""
    return np.array([[0.5] * 16, [0.5] * 16], np.float32)


def fastest(func: Any, target: Any, arrays: list[Any]) -> float:
    """Seconds of the fastest of REPEAT runs."""
    import tvm

    library = tvm.compile(func.with_attr("global_symbol", "main"), target)
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    evaluator = library.mod.time_evaluator("main", tvm.cpu(), number=1, repeat=REPEAT)
    return float(min(evaluator(*tensors).results))


def register_func(target: Any, cores: int) -> tuple[Any, int]:
    """(kernel, its operations): every thread repeats r_i <- a r_i + b on CHAINS registers."""
    from tvm_structured.schedules.cpu import Cpu
    from tvm_structured.schedules.emit import Emitter, arg, parallel, prim_func, serial

    e = Emitter(Cpu.of(target))
    with prim_func("register_peak") as made:
        given, out = arg("given", (2, 16)), arg("out", (cores, 16))
        with parallel(0, cores) as thread:
            a, b = (e.bind(e.load(given, row, 0)) for row in range(2))
            chains = e.registers(CHAINS)
            for index, chain in enumerate(chains):
                e.set(chain, e.splat(1.0 + index))
            with serial(0, STEPS):
                for chain in chains:
                    e.set(chain, a * chain[0] + b)
            e.store(out, total(chains), thread, 0)
    return made.func, 2 * CHAINS * e.lanes * STEPS * cores


def stream_func(target: Any, shape: tuple[int, ...], passes: int) -> Any:
    """Every thread sums its part of an array, `passes` times."""
    from tvm_structured.schedules.cpu import Cpu
    from tvm_structured.schedules.emit import Emitter, arg, parallel, prim_func, serial

    e = Emitter(Cpu.of(target))
    cores, vectors, width = shape
    with prim_func("stream") as made:
        data, out = arg("data", shape), arg("out", (cores, 16))
        with parallel(0, cores) as thread:
            chains = e.registers(CHAINS)
            e.zero(chains)
            with serial(0, passes):
                with serial(0, vectors) as row:
                    for first in range(0, width, e.lanes):
                        chain = chains[first // e.lanes % CHAINS]
                        e.set(chain, chain[0] + e.load(data, thread, row, first))
            e.store(out, total(chains), thread, 0)
    return made.func


def total(chains: Any) -> Any:
    result = chains[0][0]
    for chain in chains[1:]:
        result = result + chain[0]
    return result
