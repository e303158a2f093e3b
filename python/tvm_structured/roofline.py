"""The roofline of this machine: what no kernel can exceed (Williams, Waterman and Patterson 2009).

Measured once with all threads that TVM uses and kept beside the measured costs: the multiply-adds a second that
registers alone allow, and the bytes a second of sums over an array in memory and over one in the last-level cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.files import atomic
from tvm_structured.line_store import cache_directory
from tvm_structured.targets import host_cpu, physical_cores, resolve_target, use_all_cores

MEMORY_BYTES = 256 << 20  # larger than any last-level cache that a few cores have
CACHE_BYTES = 8 << 20  # larger than the second level of a few cores, smaller than the last
STEPS = 1 << 17  # of the register kernel, a few milliseconds
CHAINS = 12  # independent sums: latency 4, two units; leaves registers for the factors where there are 16
REPEAT = 7


@dataclass(frozen=True)
class Roofline:
    """Operations a second (a multiply-add is two), bytes read a second from memory and from the last-level cache."""

    peak_flops: float
    memory_bandwidth: float
    cache_bandwidth: float

    def bound(self, flops: float, moved: float) -> float:
        """Seconds that the operations or the bytes take at least, whichever is longer.

        Bytes that fit into the array the cache was measured with count at the cache's speed. What lies in the first
        or second level is faster still, so that a small kernel may take less than its bound.
        """
        bandwidth = self.cache_bandwidth if moved <= CACHE_BYTES else self.memory_bandwidth
        return max(flops / self.peak_flops, moved / bandwidth)

    def fraction_of_bound(self, flops: float, moved: float, seconds: float) -> float:
        """max(flops / peak, bytes / bandwidth) / seconds: 1 is as fast as the machine allows."""
        return self.bound(flops, moved) / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.peak_flops / 1e9:,.0f} GFLOP/s, {self.memory_bandwidth / 1e9:,.1f} GB/s from memory, "
            f"{self.cache_bandwidth / 1e9:,.1f} GB/s from the last-level cache"
        )


def roofline(measure: bool = True) -> Roofline | None:
    """The stored roofline of this machine; where there is none, a new one (about two seconds), or None."""
    path, key = store_path(), machine_key()
    known = read_store(path)
    found = parse(known.get(key))
    if found is not None or not measure:
        return found
    found = measure_roofline()
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
        found = Roofline(**{name: float(value) for name, value in described.items()})
    except (AttributeError, TypeError, ValueError):
        return None
    return found if min(asdict(found).values()) > 0 else None


def measure_roofline() -> Roofline:
    """The best of several runs of each kernel: a bound, not a typical value."""
    use_all_cores()
    target, cores = resolve_target("host"), physical_cores()
    registers, flops = register_func(target, cores)
    peak = flops / fastest(registers, target, [factors(), np.zeros((cores, 16), np.float32)])
    bandwidths = []
    for size, passes in ((MEMORY_BYTES, 1), (CACHE_BYTES, 16)):
        vectors = size // 4 // (16 * CHAINS * cores)
        array = np.ones((cores, vectors, 16 * CHAINS), np.float32)
        stream = stream_func(target, array.shape, passes)
        seconds = fastest(stream, target, [array, np.zeros((cores, 16), np.float32)])
        bandwidths.append(passes * array.nbytes / seconds)
    return Roofline(peak, *bandwidths)


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
