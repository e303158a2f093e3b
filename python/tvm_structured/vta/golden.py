"""Programs with known results, from .npz files: read defensively, run under every start order, compared bit for bit.

A file holds `config` (JSON), `insns` (N, 2) uint64, `run_lengths`, `debug_flag` (1: skip execution), `dram_init`,
`dram_final`, `counters` with `counter_names`, and the final `sram_uop`, `sram_wgt`, `sram_inp` and `sram_acc`. Where
its `meta` (JSON) has "quirk": true, it relies on what the original did with negative loop ranges.
"""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.program import Program
from tvm_structured.vta.simulator import Simulator

POLLINGS = tuple(itertools.permutations(range(3)))
BUFFERS = {"sram_uop": Memory.UOP, "sram_wgt": Memory.WGT, "sram_inp": Memory.INP, "sram_acc": Memory.ACC}
NEEDED = ("config", "insns", "run_lengths", "dram_init", "dram_final", "counters", "counter_names", *BUFFERS)


@dataclass(frozen=True)
class Golden:
    """The contents of one file."""

    name: str
    config: VTAConfig
    programs: tuple[Program, ...]
    skip_execution: bool
    arrays: dict[str, NDArray[Any]]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Golden:
        """Raises VTAError, naming the file, where it is not such a file."""
        try:
            # numpy leaves the file open where it is no archive, if it opened it
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, TypeError) as error:
            raise VTAError(f"{path}: not a readable .npz file ({error})") from None
        missing = [name for name in NEEDED if name not in arrays]
        if missing:
            raise VTAError(f"{path}: no {', '.join(missing)}")
        try:
            return cls._from_arrays(Path(path).stem, arrays)
        except (VTAError, ValueError, TypeError) as error:
            raise VTAError(f"{path}: {error}") from error

    @classmethod
    def _from_arrays(cls, name: str, arrays: dict[str, NDArray[Any]]) -> Golden:
        config = VTAConfig.from_json(str(arrays["config"]))
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        ends = np.cumsum(arrays["run_lengths"])
        if ends.size == 0 or ends[-1] != len(arrays["insns"]):
            raise VTAError(f"run_lengths do not add up to the {len(arrays['insns'])} instructions")
        parts = np.split(arrays["insns"], ends[:-1])
        programs = tuple(Program(config, words, bool(meta.get("quirk"))) for words in parts)
        skip = bool(int(arrays.get("debug_flag", 0)) & 1)
        return cls(name, config, programs, skip, arrays)

    def differences(self, simulator: Simulator, polling: tuple[int, ...]) -> list[str]:
        """Run from the start; names of what came out differently."""
        simulator.reset()
        simulator.dram[:] = self.arrays["dram_init"]
        for program in self.programs:
            simulator.run(program, skip_execution=self.skip_execution, polling=polling)
        found = {name: simulator.sram(memory).view(np.uint8) for name, memory in BUFFERS.items()}
        found["dram_final"] = simulator.dram
        wrong = [name for name, value in found.items() if not same_bytes(value, self.arrays[name])]
        counters = simulator.counters
        names = [str(name) for name in self.arrays["counter_names"]]
        expected = dict(zip(names, self.arrays["counters"].tolist(), strict=True))
        return wrong + [name for name, value in expected.items() if counters.get(name) != value]


def same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return np.array_equal(a.reshape(-1).view(np.uint8), np.ascontiguousarray(b).reshape(-1).view(np.uint8))


def check_file(path: str | os.PathLike[str], target: Any = "host") -> str:
    """What is wrong under some start order of the modules; empty where all is right."""
    try:
        golden = Golden.load(path)
        simulator = Simulator(golden.config, len(golden.arrays["dram_init"]), target)
        for polling in POLLINGS:
            wrong = golden.differences(simulator, polling)
            if wrong:
                return f"differs in {', '.join(wrong)} (polling {polling})"
    except VTAError as error:
        return str(error)
    return ""


def check_folder(folder: str | os.PathLike[str], target: Any = "host") -> Iterator[tuple[str, str]]:
    """(file name, what is wrong) for each .npz file. Raises VTAError where there is none."""
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise VTAError(f"{folder}: no .npz files")
    for path in paths:
        yield path.name, check_file(path, target)
