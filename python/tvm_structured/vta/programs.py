"""The programs of a compiled model: to list, to dump, to draw, to describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import DeadlockError, VTAError
from tvm_structured.files import atomic
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.lowered import Lowered
from tvm_structured.vta.machine import COUNTERS
from tvm_structured.vta.region import Region
from tvm_structured.vta.timeline import save_timeline
from tvm_structured.vta.timing import Timing, model


@dataclass(frozen=True, eq=False)
class Programs:
    """Regions in the order in which they run; each is a series of programs in one DRAM."""

    config: VTAConfig
    regions: tuple[Region, ...]

    @cached_property
    def timings(self) -> dict[str, Timing]:
        """Layer -> the modelled times of its program; less those whose order would overfill a queue of the hardware."""
        timings = {}
        for name, _, made in self.layers():
            with suppress(DeadlockError):
                timings[name] = model(made.program)
        return timings

    def layers(self) -> Iterator[tuple[str, int, Lowered]]:
        """(name, region, program) in order; a name that occurs again gets a number."""
        seen: dict[str, int] = {}
        for number, region in enumerate(self.regions):
            for step in region.steps:
                name = step.lowered.operator.name
                seen[name] = seen.get(name, 0) + 1
                yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), number, step.lowered

    def __getitem__(self, layer: str) -> Lowered:
        """Raises VTAError for a layer that is not on the accelerator."""
        found = {name: lowered for name, _, lowered in self.layers()}
        if layer not in found:
            raise VTAError(f"{layer!r} has no program; there are {', '.join(found) or 'none'}")
        return found[layer]

    def listing(self, layer: str | None = None) -> str:
        """The instructions of one layer, or of all, as the assembler reads them; layers are separated by comments."""
        if layer is not None:
            return str(self[layer].program)
        return "\n".join(f"# {name} (region {number})\n{made.program}" for name, number, made in self.layers())

    def timeline(self, layer: str, path: Any) -> Path:
        """Write when load, compute and store work on a layer, by the timing model: a picture (.png, .svg, .pdf) or a
        trace that chrome://tracing and Perfetto show (.json).

        Raises VTAError for another suffix, a layer that is not on the accelerator or one that has no modelled times.
        """
        made = self[layer]
        return save_timeline(self.timings.get(layer) or model(made.program), made.program, path, layer)

    def describe(self) -> dict[str, Any]:
        """What a module carries with it, for `vta_stats`."""
        layers = [
            {
                "layer": name,
                "operator": type(made.operator).__name__,
                "region": number,
                "instructions": len(made.program),
                "counters": dict(zip(COUNTERS, made.program.counts.sum(axis=0).tolist(), strict=True)),
                "cycles": self.timings[name].cycles if name in self.timings else None,
                "reason": made.reason,
            }
            for name, number, made in self.layers()
        ]
        return {"config": json.loads(self.config.to_json()), "counters": list(COUNTERS), "layers": layers}

    def dump(self, folder: Any) -> Path:
        """Write, for each region, DRAM's constants and addresses and every layer's stream (`region0.npz`), and listings
        (`region0.txt`): what a driver of the hardware needs. Raises VTAError where the folder cannot be written."""
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for number, region in enumerate(self.regions):
                with atomic(target / f"region{number}.npz") as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, **region_arrays(self.config, region))
                text = "\n".join(f"# {step.lowered.operator.name}\n{step.lowered.program}" for step in region.steps)
                with atomic(target / f"region{number}.txt") as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise VTAError(f"{target}: cannot write the dump ({error})") from None
        return target


def region_arrays(config: VTAConfig, region: Region) -> dict[str, Any]:
    """config (JSON), constants (uint8) from byte `first_constant` of `dram_bytes` on; inputs and outputs as rows of
    (address, bytes); one stream for each step, uint64 (N, 2)."""
    placed = {"inputs": region.inputs, "outputs": region.results}
    return {
        "config": np.array(config.to_json()),
        "constants": region.constants,
        "first_constant": np.array(region.first_constant),
        "dram_bytes": np.array(region.dram_bytes),
        **{
            name: np.array([(p.address, p.layout.nbytes) for p in tensors], np.int64).reshape(-1, 2)
            for name, tensors in placed.items()
        },
        **{f"stream{index}": step.lowered.program.words for index, step in enumerate(region.steps)},
    }
