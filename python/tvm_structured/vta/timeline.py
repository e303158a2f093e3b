"""Pictures of a program's modelled times: load, compute and store, one row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import EnvironmentMismatchError, VTAError
from tvm_structured.files import atomic
from tvm_structured.vta.config import Memory
from tvm_structured.vta.isa import INSTRUCTIONS, Alu, Finish, Gemm, Load, Store
from tvm_structured.vta.order import MODULES
from tvm_structured.vta.program import Program
from tvm_structured.vta.timing import Timing

PICTURES = (".png", ".svg", ".pdf")
COLORS = {
    "LOAD INP": "tab:blue",
    "LOAD WGT": "tab:cyan",
    "LOAD UOP": "tab:pink",
    "LOAD ACC": "tab:olive",
    "LOAD ACC_8BIT": "tab:olive",
    "GEMM": "tab:red",
    "GEMM reset": "tab:brown",
    "ALU": "tab:orange",
    "STORE": "tab:green",
    "FINISH": "tab:gray",
    "tokens": "lightgray",
}
TRANSFER = ("sram_base", "dram_base", "x_size", "y_size")
DETAILS: dict[int, tuple[str, ...]] = {
    Load.opcode: TRANSFER,
    Store.opcode: TRANSFER,
    Gemm.opcode: ("uop_bgn", "uop_end", "iter_out", "iter_in"),
    Alu.opcode: ("alu_opcode", "use_imm", "imm", "uop_bgn", "uop_end", "iter_out", "iter_in"),
    Finish.opcode: (),
}


def save_timeline(timing: Timing, program: Program, path: Any, title: str = "program") -> Path:
    """A picture, or a trace for Chrome and Perfetto (.json). Raises VTAError for another suffix."""
    target = Path(path)
    if target.suffix not in (".json", *PICTURES):
        raise VTAError(f"{target}: a timeline is one of .json, {', '.join(PICTURES)}")
    try:
        with atomic(target) as temporary:
            if target.suffix == ".json":
                temporary.write_text(json.dumps(chrome_trace(timing, program, title)), encoding="utf-8")
            else:
                draw(timing, program, temporary, title)
    except OSError as error:
        raise VTAError(f"{target}: cannot write the timeline ({error})") from None
    return target


def names_of(program: Program) -> list[str]:
    """What every instruction is: a key of `COLORS`; "tokens" moves nothing else."""
    c, names = program.columns, []
    for i, opcode in enumerate(c["opcode"].tolist()):
        name = INSTRUCTIONS[opcode].mnemonic
        if opcode in (Load.opcode, Store.opcode) and c["x_size"][i] == 0:
            name = "tokens"
        elif opcode == Load.opcode:
            name = f"LOAD {Memory(int(c['memory_type'][i])).name}"
        elif opcode == Gemm.opcode and c["reset"][i]:
            name = "GEMM reset"
        names.append(name)
    return names


def chrome_trace(timing: Timing, program: Program, title: str = "program") -> dict[str, Any]:
    """Trace Event Format: one complete event for each instruction; a microsecond stands for a modelled cycle."""
    c, names = program.columns, names_of(program)
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": index, "args": {"name": module}}
        for index, module in enumerate(MODULES)
    ]
    for index, name in enumerate(names):
        start, end = int(timing.start[index]), int(timing.end[index])
        event = {"name": name, "ts": start, "dur": end - start, "tid": int(timing.module[index])}
        fields = {name: int(c[name][index]) for name in DETAILS[int(c["opcode"][index])]}
        rows.append({"ph": "X", "pid": 0, **event, "args": {"instruction": index, **fields}})
    return {"traceEvents": rows, "otherData": {"title": title, "cycles (modelled)": timing.cycles}}


def draw(timing: Timing, program: Program, path: Path, title: str) -> None:
    """Bars over modelled cycles."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentMismatchError(
            "pictures of timelines need matplotlib; run: pip install 'tvm-structured[report]', or write .json"
        ) from None
    figure = Figure(figsize=(14, 2.6), layout="constrained")
    axes = figure.subplots()
    names = np.array(names_of(program))
    for kind in (kind for kind in COLORS if kind in names):
        for number, module in enumerate(np.unique(timing.module[names == kind]).tolist()):
            chosen = np.flatnonzero((names == kind) & (timing.module == module))
            spans = list(zip(timing.start[chosen], (timing.end - timing.start)[chosen], strict=True))
            label = kind if number == 0 else None
            axes.broken_barh(spans, (module - 0.4, 0.8), facecolors=COLORS[kind], linewidth=0, label=label)
    axes.set_yticks(range(len(MODULES)), MODULES)
    axes.invert_yaxis()
    share = f"{100 * timing.gemm_utilisation:.0f} % of them with a {Gemm.__name__.upper()} micro-op"
    axes.set_title(f"{title}: {timing.cycles:,} modelled cycles, {share}")
    axes.set_xlabel("cycles (modelled)")
    axes.legend(loc="upper right", ncols=len(COLORS), fontsize="small")
    figure.savefig(path)
