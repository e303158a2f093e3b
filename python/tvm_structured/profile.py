"""Profile: where the time of a real run goes, layer by layer. Table, JSON and HTML; see profiling.py for taking one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvm_structured.files import atomic
from tvm_structured.roofline import Roofline


@dataclass(frozen=True)
class ProfileRow:
    """One layer, or one operator outside the layers (`layer` is empty then), summed over its calls in one run.

    `flops` are those of the layer in its form, None for other operators; `bytes` those of the kernels' arguments,
    each read or written once. `seconds` is the median over the runs; about a microsecond of each call is measuring.
    `bound_fraction` is the share of the machine's bound (see Roofline), None where that is not known.
    """

    layer: str
    kernel: str
    calls: int
    seconds: float
    flops: int | None
    bytes: int
    bound_fraction: float | None = None

    @property
    def flops_per_second(self) -> float | None:
        return self.flops / self.seconds if self.flops is not None and self.seconds > 0 else None

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the first call. `run_seconds` is the median of whole runs without an instrument: more
    than the sum by what the VM itself does, less by what measuring costs."""

    target: str
    rows: tuple[ProfileRow, ...]
    run_seconds: float
    repeat: int
    roofline: Roofline | None = None

    def total(self) -> ProfileRow:
        """The sum of all rows."""
        flops = [row.flops for row in self.rows if row.flops is not None]
        seconds = sum(row.seconds for row in self.rows)
        bounds = [row.bound_fraction * row.seconds for row in self.rows if row.bound_fraction is not None]
        fraction = sum(bounds) / seconds if len(bounds) == len(self.rows) and seconds > 0 else None
        calls, moved = sum(row.calls for row in self.rows), sum(row.bytes for row in self.rows)
        return ProfileRow("total", "", calls, seconds, sum(flops) if flops else None, moved, fraction)

    def share(self, row: ProfileRow) -> float:
        """The row's part of the sum of all."""
        whole = self.total().seconds
        return row.seconds / whole if whole > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Profile:
        machine = described["roofline"]
        return cls(
            described["target"],
            tuple(ProfileRow(**row) for row in described["rows"]),
            described["run_seconds"],
            described["repeat"],
            None if machine is None else Roofline.from_dict(machine),
        )

    def to_json(self, path: Any) -> None:
        """Write the rows and their total."""
        with atomic(path) as temporary:
            document = {**self.to_dict(), "total": asdict(self.total())}
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: Any) -> None:
        """Write one self-contained page: a picture of the times, and the table."""
        from tvm_structured.report_html import render_profile

        page = render_profile(self)
        with atomic(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def __str__(self) -> str:
        from tvm_structured.report import plain_text

        return plain_text(self)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title(), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
        table.caption = self.caption()
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if index > 1 else "left")
        for row in self.rows:
            table.add_row(*profile_cells(self, row))
        table.add_section()
        table.add_row(*profile_cells(self, self.total()))
        return table

    def title(self) -> str:
        return f"profile for {self.target}, medians of {self.repeat} runs"

    def caption(self) -> str:
        whole = f"a whole run takes {self.run_seconds * 1e6:,.1f} us"
        return f"{whole}; bound: {self.roofline}" if self.roofline else whole


HEADINGS = ("layer", "kernel", "calls", "time", "share", "MFLOP", "GFLOP/s", "GB/s", "of bound")


def profile_cells(profile: Profile, row: ProfileRow) -> list[str]:
    """A row's texts, in the order of HEADINGS."""
    rate, moved = row.flops_per_second, row.bytes_per_second
    return [
        row.layer or "-",
        row.kernel,
        str(row.calls),
        f"{row.seconds * 1e6:,.1f} us",
        f"{100 * profile.share(row):.1f} %",
        "-" if row.flops is None else f"{row.flops / 1e6:,.2f}",
        "-" if rate is None else f"{rate / 1e9:,.1f}",
        "-" if moved is None else f"{moved / 1e9:,.1f}",
        "-" if row.bound_fraction is None else f"{100 * row.bound_fraction:.0f} %",
    ]
