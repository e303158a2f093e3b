"""Reports and profiles as self-contained HTML pages (extra `report`: jinja2, matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from tvm_structured.frontend import need
from tvm_structured.report import HEADINGS, PREDICTED, Report, cells

if TYPE_CHECKING:
    from tvm_structured.profile import Profile

BLUE, ORANGE, GREY = "#2a6fbb", "#e08a2b", "#9a9a9a"
OPERATIONS = "Operations are those of one run; a multiply-add counts as two."
BOUND = "Of bound: the time that the machine's peak or its bandwidth allows, divided by the time taken."


def render(report: Report) -> str:
    """The report's page. Raises EnvironmentMismatchError where jinja2 or matplotlib is missing."""
    lines = [("plain" if row.structure == "dense" else "", cells(row)) for row in report.rows]
    notes = [f"Error: relative Frobenius error against the model's own weight. {OPERATIONS} {BOUND}"]
    return page(
        title=f"Layers for {report.target}",
        headings=HEADINGS,
        text_columns=(*HEADINGS[:4], "why"),
        lines=[*lines, ("total", cells(report.total()))],
        notes=[*notes, PREDICTED] if report.has_predictions else notes,
        picture=report_bars(report),
    )


def render_profile(profile: Profile) -> str:
    """The profile's page. Raises EnvironmentMismatchError where jinja2 or matplotlib is missing."""
    from tvm_structured.profile import HEADINGS, profile_cells

    lines = [("" if row.layer else "plain", profile_cells(profile, row)) for row in profile.rows]
    return page(
        title=f"P{profile.title()[1:]}",
        headings=HEADINGS,
        text_columns=HEADINGS[:2],
        lines=[*lines, ("total", profile_cells(profile, profile.total()))],
        notes=[f"A{profile.caption()[1:]}.", f"{OPERATIONS} {BOUND}"],
        picture=profile_bars(profile),
    )


def page(**values: Any) -> str:
    """The template, filled in."""
    jinja2 = need("jinja2", "report")
    template = (resources.files("tvm_structured") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return str(environment.from_string(template).render(values))


def report_bars(report: Report) -> Any:
    """An SVG: for each layer parameters and operations as a fraction of the dense layer's; and times, if any."""
    rows = report.rows[::-1]
    timed = any(row.seconds is not None for row in rows)
    figure, panels = new_figure(len(rows), 2 if timed else 1)
    shares = [
        (label, colour, [100 * getattr(row, part) / max(1, getattr(row, whole)) for row in rows])
        for label, colour, part, whole in (
            ("parameters", BLUE, "params", "dense_params"),
            ("operations", ORANGE, "flops", "dense_flops"),
        )
    ]
    names = [f"{row.layer}\n{row.structure} {row.size}" for row in rows]
    draw_bars(panels[0], names, shares, "% of the dense layer", "%.3g %%")
    panels[0].axvline(100, color="#888", linewidth=1)
    if timed:
        times = [
            (label, colour, [1e6 * (getattr(row, part) or 0) for row in rows])
            for label, colour, part in (("chosen kernel", BLUE, "seconds"), ("dense kernel", GREY, "dense_seconds"))
        ]
        draw_bars(panels[1], [""] * len(rows), times, "us in one run", "%.3g")
    return svg(figure)


def profile_bars(profile: Profile) -> Any:
    """An SVG: for each row the time it takes and, where that is known, the time that the machine allows."""
    rows = profile.rows[::-1]
    figure, panels = new_figure(len(rows), 1)
    series = [("time", BLUE, [1e6 * row.seconds for row in rows])]
    if any(row.bound_fraction is not None for row in rows):
        series.append(("the machine's bound", GREY, [1e6 * row.seconds * (row.bound_fraction or 0) for row in rows]))
    draw_bars(panels[0], [f"{row.layer or '-'}\n{row.kernel}" for row in rows], series, "us in one run", "%.3g")
    return svg(figure)


def new_figure(rows: int, panels: int) -> tuple[Any, list[Any]]:
    need("matplotlib", "report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if panels == 1 else 13, 1.2 + 0.42 * max(1, rows)), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def draw_bars(
    axes: Any, names: Sequence[str], series: Sequence[tuple[str, str, list[float]]], unit: str, text: str
) -> None:
    """Horizontal bars, one of each series to a name. `series`: (label, colour, lengths)."""
    for number, (label, colour, lengths) in enumerate(series):
        offset = 0.2 - 0.4 * number if len(series) > 1 else 0.0
        drawn = axes.barh([i + offset for i in range(len(names))], lengths, height=0.36, color=colour, label=label)
        axes.bar_label(drawn, fmt=text, padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), list(names), fontsize=8)
    widest = max((length for _, _, lengths in series for length in lengths), default=0)
    axes.set_xlim(0, 1.18 * (widest or 1))
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.5 / (1 + len(names))), ncols=2, frameon=False)


def svg(figure: Any) -> Any:
    from markupsafe import Markup

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])
