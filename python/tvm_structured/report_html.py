"""The report as one self-contained HTML page (extra `report`: jinja2, matplotlib)."""

from __future__ import annotations

import io
from importlib import resources
from typing import Any

from tvm_structured.frontend import need
from tvm_structured.report import Report, cells


def render(report: Report) -> str:
    """The page's text. Raises EnvironmentMismatchError where jinja2 or matplotlib is missing."""
    jinja2 = need("jinja2", "report")
    template = (resources.files("tvm_structured") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [(row, cells(row)) for row in report.rows]
    return environment.from_string(template).render(
        report=report, rows=rows, total=cells(report.total()), picture=bars(report)
    )


def bars(report: Report) -> Any:
    """An SVG: for each layer parameters and operations as a fraction of the dense layer's."""
    need("matplotlib", "report")
    from markupsafe import Markup
    from matplotlib.figure import Figure

    rows = report.rows[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.42 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    for offset, (label, colour, part, whole) in zip(
        (0.2, -0.2),
        (("parameters", "#2a6fbb", "params", "dense_params"), ("operations", "#e08a2b", "flops", "dense_flops")),
        strict=True,
    ):
        heights = [100 * getattr(row, part) / max(1, getattr(row, whole)) for row in rows]
        drawn = axes.barh([i + offset for i in range(len(rows))], heights, height=0.36, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.3g %%", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row.layer}\n{row.structure} {row.size}" for row in rows], fontsize=8)
    axes.axvline(100, color="#888", linewidth=1)
    widest = max((bar.get_width() for drawn in axes.containers for bar in drawn), default=100)
    axes.set_xlim(0, 1.18 * max(100, widest))
    axes.set_xlabel("% of the dense layer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.5 / (1 + len(rows))), ncols=2, frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])
