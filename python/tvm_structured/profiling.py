"""Taking a profile: every kernel call of a run is timed and given to its layer.

The VM tells an instrument before and after each call. Layers share kernels, so the module's metadata says which call
of a kernel belongs to which layer. Needs only TVM's runtime, save for measuring the roofline.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_structured.inputs import Input
from tvm_structured.profile import Profile, ProfileRow
from tvm_structured.roofline import Roofline, roofline

BUILTIN = "vm.builtin."


@dataclass
class Recorder:
    """An instrument of the VM: the calls of one run that are neither builtins nor call others, in order."""

    weigh: bool  # also sum up the bytes of the arguments; takes too long while times are measured
    calls: list[tuple[str, float, int]] = field(default_factory=list)  # symbol, seconds, bytes
    _open: list[list[Any]] = field(default_factory=list)  # [is a leaf, start]

    def __call__(self, function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        if before:
            if self._open:
                self._open[-1][0] = False
            self._open.append([True, time.perf_counter()])
            return 0  # VMInstrumentReturnKind.NO_OP
        is_leaf, start = self._open.pop()
        if is_leaf and not symbol.startswith(BUILTIN):
            self.calls.append((symbol, now - start, num_bytes(arguments) if self.weigh else 0))
        return 0


def num_bytes(arguments: Sequence[Any]) -> int:
    """Bytes of the tensors among a call's arguments."""
    tensors = [a for a in arguments if hasattr(a, "shape") and hasattr(a, "dtype")]
    return sum(math.prod(int(extent) for extent in t.shape) * t.dtype.itemsize for t in tensors)


def take_profile(
    vm: Any, metadata: Mapping[str, Any], arguments: Sequence[Any], repeat: int = 10, measure_bound: bool = True
) -> Profile:
    """Run `main` with an instrument and without, in turns. `arguments` are TVM tensors."""
    repeat = max(1, repeat)
    machine = roofline(measure_bound) if has_compiler() else None
    main = vm["main"]
    main(*arguments)
    weighed = record(vm, arguments, weigh=True)
    runs, whole = [], []
    for _ in range(repeat):
        runs.append([seconds for _, seconds, _ in record(vm, arguments, weigh=False)])
        start = time.perf_counter()
        main(*arguments)
        whole.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in zip(*runs, strict=True)]
    calls = [(symbol, seconds, moved) for (symbol, _, moved), seconds in zip(weighed, medians, strict=True)]
    named = with_layers(calls, metadata.get("kernels", ()))  # modules exported by version 0.1 have none
    flops = layer_flops(metadata, [tuple(argument.shape) for argument in arguments])
    return Profile(metadata["target"], rows_of(named, flops, machine), statistics.median(whole), repeat, machine)


def has_compiler() -> bool:
    """Whether TVM is more than its runtime: LLVM knows the CPU's name, and the roofline's kernels are compiled."""
    import tvm

    return not tvm.base._RUNTIME_ONLY


def record(vm: Any, arguments: Sequence[Any], weigh: bool) -> list[tuple[str, float, int]]:
    """The calls of one run: symbol, seconds, bytes."""
    recorder = Recorder(weigh)
    vm.set_instrument(recorder)
    try:
        vm["main"](*arguments)
    finally:
        vm.set_instrument(None)
    return recorder.calls


def with_layers(
    calls: Sequence[tuple[str, float, int]], kernels: Sequence[Sequence[str]]
) -> list[tuple[str, str, float, int]]:
    """(layer, symbol, seconds, bytes): the n-th run-time call of a symbol is the n-th of the module's text.

    A symbol that runs more or less often than it is written (branches, recursion) has a layer only if all its calls
    have the same one. Views that became no call at all do no harm, as symbols are counted apart.
    """
    written: dict[str, list[str]] = {}
    for symbol, layer in kernels:
        written.setdefault(symbol, []).append(layer)
    counts: dict[str, int] = {}
    for symbol, _, _ in calls:
        counts[symbol] = counts.get(symbol, 0) + 1
    seen: dict[str, int] = {}
    named = []
    for symbol, seconds, moved in calls:
        layers = written.get(symbol, [])
        index = seen.get(symbol, 0)
        seen[symbol] = index + 1
        if len(layers) == counts[symbol]:
            layer = layers[index]
        else:
            layer = layers[0] if len(set(layers)) == 1 else ""
        named.append((layer, symbol, seconds, moved))
    return named


def layer_flops(metadata: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> dict[str, int | None]:
    """Operations of each layer in a run on inputs of these shapes.

    The report counts an extent that is open as one; where exactly one size was open, the operations grow with it.
    """
    sizes = {
        size
        for described, shape in zip(metadata["inputs"], shapes, strict=True)
        for extent, size in zip(Input.from_json(described).shape, shape, strict=True)
        if extent is None
    }
    factor = int(next(iter(sizes), 1)) if len(sizes) <= 1 else None
    return {row["layer"]: None if factor is None else factor * row["flops"] for row in metadata["report"]["rows"]}


def rows_of(
    calls: Sequence[tuple[str, str, float, int]], flops: Mapping[str, int | None], machine: Roofline | None
) -> tuple[ProfileRow, ...]:
    """One row for each layer, and one for each operator outside the layers."""
    groups: dict[tuple[str, str], list[tuple[str, float, int]]] = {}
    for layer, symbol, seconds, moved in calls:
        name = readable(symbol)
        groups.setdefault((layer, "" if layer else name), []).append((name, seconds, moved))
    rows = []
    for (layer, _), members in groups.items():
        seconds, moved = sum(s for _, s, _ in members), sum(m for _, _, m in members)
        work = flops.get(layer) if layer else None
        known = machine is not None and (work is not None or not layer)
        fraction = machine.fraction_of_bound(work or 0, moved, seconds) if machine is not None and known else None
        kernel = ", ".join(dict.fromkeys(name for name, _, _ in members))
        rows.append(ProfileRow(layer, kernel, len(members), seconds, work, moved, fraction))
    return tuple(rows)


def readable(symbol: str) -> str:
    """A kernel's name without the number that TVM appends to tell symbols apart: `conv2d7` is `conv2d`."""
    return re.sub(r"(?<=[a-z])_?\d+$", "", symbol)
