"""Report: one row per layer says what was chosen, why, and what it saves. Table, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm_structured.files import atomic

WIDTH = 180  # characters of a printed table


@dataclass(frozen=True)
class Row:
    """One layer. Bytes are those of the factors; FLOPs those of one run of the model, all uses of the layer.

    `error` is the relative Frobenius error against the model's weight. `seconds` is the time of the layer's kernels
    in one run, `dense_seconds` that of the dense kernel, as the choice was made on: measured or predicted; None
    where nothing was compared. `bound_fraction` is the share of the machine's bound (see Roofline) that the chosen
    kernel reaches, None where no time was measured.
    """

    layer: str
    kind: str
    structure: str
    size: str
    params: int
    dense_params: int
    bytes: int
    dense_bytes: int
    flops: int
    dense_flops: int
    error: float
    reason: str
    seconds: float | None = None
    dense_seconds: float | None = None
    is_measured: bool = True
    bound_fraction: float | None = None


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model."""

    target: str
    rows: tuple[Row, ...]

    def total(self) -> Row:
        """The sum of all rows; its error is the largest one. A sum of times exists where every row has one."""
        sums = {f.name: sum(getattr(row, f.name) for row in self.rows) for f in fields(Row) if f.type == "int"}
        error = max((row.error for row in self.rows), default=0.0)
        seconds, dense_seconds = (
            all_or_none(times)
            for times in ([row.seconds for row in self.rows], [row.dense_seconds for row in self.rows])
        )
        bounds = all_or_none(
            [r.bound_fraction * r.seconds if r.bound_fraction is not None and r.seconds else None for r in self.rows]
        )
        return Row(
            **{"layer": "total", "kind": "", "structure": "", "size": "", "reason": ""},
            **sums,
            error=error,
            seconds=seconds,
            dense_seconds=dense_seconds,
            is_measured=all(row.is_measured for row in self.rows),
            bound_fraction=bounds / seconds if bounds is not None and seconds else None,
        )

    @property
    def has_predictions(self) -> bool:
        return any(row.seconds is not None and not row.is_measured for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Report:
        known = {f.name for f in fields(Row)}  # a module of another version may say less, or more
        rows = ({name: value for name, value in row.items() if name in known} for row in described["rows"])
        return cls(described["target"], tuple(Row(**row) for row in rows))

    def to_json(self, path: Any) -> None:
        """Write the rows and their total."""
        with atomic(path) as temporary:
            document = {**self.to_dict(), "total": asdict(self.total())}
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: Any) -> None:
        """Write one self-contained page: a picture of parameters, operations and times, and the table."""
        from tvm_structured.report_html import render

        page = render(self)
        with atomic(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def __str__(self) -> str:
        return plain_text(self)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title=f"layers for {self.target}", box=box.SIMPLE_HEAD, title_justify="left")
        table.caption, table.caption_justify = PREDICTED if self.has_predictions else None, "left"
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if 4 <= index < len(HEADINGS) - 1 else "left")
        for row in self.rows:
            table.add_row(*cells(row))
        table.add_section()
        table.add_row(*cells(self.total()))
        return table


def all_or_none(values: list[float | None]) -> float | None:
    """The sum, None where a value is missing or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def plain_text(renderable: Any) -> str:
    """What rich prints, as plain lines."""
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


HEADINGS = (
    *("layer", "kind", "structure", "size", "params", "of dense", "bytes", "MFLOP", "of dense", "error"),
    *("time", "dense time", "of bound", "why"),
)
PREDICTED = "≈ predicted from operations and bytes (for a GPU: assumed), not measured"


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of HEADINGS."""
    about = "" if row.is_measured else "≈ "
    return [
        row.layer,
        row.kind,
        row.structure,
        row.size,
        f"{row.params:,}",
        percent(row.params, row.dense_params),
        size(row.bytes),
        f"{row.flops / 1e6:,.3f}",
        percent(row.flops, row.dense_flops),
        f"{row.error:.1e}" if row.error else "0",
        duration(row.seconds, about),
        duration(row.dense_seconds, about),
        "-" if row.bound_fraction is None else f"{100 * row.bound_fraction:.0f} %",
        row.reason,
    ]


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def size(count: int) -> str:
    """`840 B`, `16.4 kB`, `67.1 MB`."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float | None, about: str = "") -> str:
    return "-" if seconds is None else f"{about}{seconds * 1e6:,.1f} us"


def make_report(calls: Mapping[str, Iterable[Any]], plan: Any, target: str) -> Report:
    """Rows for the layers of a canonical module. `calls`: layer name -> its calls (dialect.LayerCall)."""
    rows = []
    machine = known_roofline(plan)
    for name, uses in calls.items():
        member, note, uses = plan.choices[name], plan.notes.get(name), list(uses)
        per_use = [int(use.num_rows()) for use in uses]
        dense_params = uses[0].dense_params()
        itemsize = next(iter(member.factors.values())).dtype.itemsize
        flops = sum(member.flops(count) for count in per_use)
        moved = len(uses) * member.num_bytes + sum(count * sum(member.shape) * itemsize for count in per_use)
        measured = note is not None and note.is_measured and note.seconds is not None
        rows.append(
            Row(
                layer=name,
                kind=uses[0].describe() + (f" x{len(uses)}" if len(uses) > 1 else ""),
                structure=member.name,
                size=member.describe(),
                params=member.num_params,
                dense_params=dense_params,
                bytes=member.num_bytes,
                dense_bytes=dense_params * itemsize,
                flops=flops,
                dense_flops=sum(2 * count * dense_params for count in per_use),
                error=note.error if note else 0.0,
                reason=note.reason if note else "",
                seconds=note.seconds if note else None,
                dense_seconds=note.dense_seconds if note else None,
                is_measured=measured or note is None or note.seconds is None,
                bound_fraction=machine.fraction_of_bound(flops, moved, note.seconds) if machine and measured else None,
            )
        )
    return Report(target, tuple(rows))


def known_roofline(plan: Any) -> Any:
    """The machine's roofline where the plan was made with times measured here, else None."""
    if not any(note.is_measured for note in plan.notes.values()):
        return None
    from tvm_structured.roofline import roofline

    return roofline()
