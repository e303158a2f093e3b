"""Report: one row per layer says what was chosen, why, and what it saves. Table, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tvm_structured.files import atomic


@dataclass(frozen=True)
class Row:
    """One layer. Bytes are those of the factors; FLOPs those of one run of the model, all uses of the layer.

    `error` is the relative Frobenius error against the model's weight. `seconds` is the median measured time
    of its kernels in one run, None where it was not measured.
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


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model."""

    target: str
    rows: tuple[Row, ...]

    def total(self) -> Row:
        """The sum of all rows; its error is the largest one."""
        sums = {f.name: sum(getattr(row, f.name) for row in self.rows) for f in fields(Row) if f.type == "int"}
        times = [row.seconds for row in self.rows if row.seconds is not None]
        error = max((row.error for row in self.rows), default=0.0)
        seconds = sum(times) if times else None
        return Row("total", "", "", "", **sums, error=error, reason="", seconds=seconds)

    def with_seconds(self, seconds: Mapping[str, float]) -> Report:
        """The same report with measured times by layer name."""
        return replace(self, rows=tuple(replace(row, seconds=seconds.get(row.layer)) for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Report:
        return cls(described["target"], tuple(Row(**row) for row in described["rows"]))

    def to_json(self, path: Any) -> None:
        """Write the rows and their total."""
        with atomic(path) as temporary:
            document = {**self.to_dict(), "total": asdict(self.total())}
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: Any) -> None:
        """Write one self-contained page: a picture of parameters and operations, and the table."""
        from tvm_structured.report_html import render

        page = render(self)
        with atomic(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=160, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title=f"layers for {self.target}", box=box.SIMPLE_HEAD, title_justify="left")
        for heading in ("layer", "kind", "structure", "size"):
            table.add_column(heading)
        for heading in ("params", "of dense", "MFLOP", "of dense", "error", "time"):
            table.add_column(heading, justify="right")
        table.add_column("why")
        for row in self.rows:
            table.add_row(*cells(row))
        table.add_section()
        table.add_row(*cells(self.total()))
        return table


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of the table's columns."""
    return [
        row.layer,
        row.kind,
        row.structure,
        row.size,
        f"{row.params:,}",
        percent(row.params, row.dense_params),
        f"{row.flops / 1e6:,.3f}",
        percent(row.flops, row.dense_flops),
        f"{row.error:.1e}" if row.error else "0",
        duration(row.seconds),
        row.reason,
    ]


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.1f} us"


def make_report(calls: Mapping[str, Iterable[Any]], plan: Any, target: str) -> Report:
    """Rows for the layers of a canonical module. `calls`: layer name -> its calls (dialect.LayerCall)."""
    rows = []
    for name, uses in calls.items():
        member, note, uses = plan.choices[name], plan.notes.get(name), list(uses)
        per_use = [int(use.num_rows()) for use in uses]
        dense_params = uses[0].dense_params()
        itemsize = next(iter(member.factors.values())).dtype.itemsize
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
                flops=sum(member.flops(count) for count in per_use),
                dense_flops=sum(2 * count * dense_params for count in per_use),
                error=note.error if note else 0.0,
                reason=note.reason if note else "",
            )
        )
    return Report(target, tuple(rows))
