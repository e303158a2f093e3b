"""Pictures of a program's modelled times: load, compute and store, one row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import EnvironmentMismatchError, VTAError
from tvm_structured.files import atomic
from tvm_structured.vta.isa import INSTRUCTIONS, Gemm
from tvm_structured.vta.order import MODULES
from tvm_structured.vta.program import Program
from tvm_structured.vta.timing import Timing

PICTURES = (".png", ".svg", ".pdf")
COLORS = {"LOAD": "tab:blue", "STORE": "tab:green", "GEMM": "tab:red", "ALU": "tab:orange", "FINISH": "tab:gray"}


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
    """`GEMM`, `LOAD`, ... of every instruction; resets of the accumulators are GEMM instructions."""
    names = {opcode: kind.__name__.upper() for opcode, kind in INSTRUCTIONS.items()}
    return [names[int(opcode)] for opcode in program.columns["opcode"]]


def chrome_trace(timing: Timing, program: Program, title: str = "program") -> dict[str, Any]:
    """Trace Event Format: one complete event for each instruction; a microsecond stands for a modelled cycle."""
    names = names_of(program)
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": index, "args": {"name": module}}
        for index, module in enumerate(MODULES)
    ]
    for index, name in enumerate(names):
        start, end = int(timing.start[index]), int(timing.end[index])
        event = {"name": name, "ts": start, "dur": end - start, "tid": int(timing.module[index])}
        rows.append({"ph": "X", "pid": 0, **event, "args": {"instruction": index}})
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
    for kind, color in COLORS.items():
        for module in range(len(MODULES)):
            chosen = np.flatnonzero((names == kind) & (timing.module == module))
            spans = list(zip(timing.start[chosen], (timing.end - timing.start)[chosen], strict=True))
            label = kind if module == {"LOAD": 0, "STORE": 2}.get(kind, 1) else None
            axes.broken_barh(spans, (module - 0.4, 0.8), facecolors=color, label=label)
    axes.set_yticks(range(len(MODULES)), MODULES)
    axes.invert_yaxis()
    share = f"{100 * timing.gemm_utilisation:.0f} % of them with a {Gemm.__name__.upper()} micro-op"
    axes.set_title(f"{title}: {timing.cycles:,} modelled cycles, {share}")
    axes.set_xlabel("cycles (modelled)")
    axes.legend(loc="upper right", ncols=len(COLORS), fontsize="small")
    figure.savefig(path)
