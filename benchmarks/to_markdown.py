"""Benchmark results, as the benchmarks write them with --json, as tables in Markdown, with their goals where they have.

python benchmarks/to_markdown.py layers.json convs.json models.json > tables.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_convs
import bench_gpu
import bench_layers
import bench_models
import click
import goals
import tuned_layers
from measuring import Timing, milliseconds


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(paths: Sequence[Path]) -> None:
    """Print one table for each file."""
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        machine = document.get("machine") or document["card"]
        about = ", ".join(f"{key} {value}" for key, value in machine.items())
        click.echo(f"{path.stem}: {about}\n")
        for headings, rows in [*tables(document["rows"]), *goal_table(document["rows"])]:
            click.echo("\n".join([line(headings), line(["---"] * len(headings)), *map(line, rows)]) + "\n")


def tables(rows: list[dict[str, Any]]) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """(headings, cells) for the rows of one benchmark."""
    if "model" in rows[0]:
        times = [
            [bench_models.label(row), *(milliseconds(timing(row, name)) for name in bench_models.COLUMNS)]
            for row in rows
        ]
        ratios = [bench_models.ratios(row) for row in rows]
        return [(["milliseconds", *bench_models.COLUMNS], times), (bench_models.RATIOS, ratios)]
    if "tuned_layer" in rows[0]:
        return [(tuned_layers.HEADINGS, [tuned_layers.cells(row) for row in rows])]
    if "case" in rows[0]:
        return [(bench_gpu.HEADINGS, [bench_gpu.cells(row) for row in rows])]
    bench = bench_convs if "algorithm" in rows[0] else bench_layers
    return [(bench.HEADINGS, [bench.cells(row) for row in rows])]


def goal_table(rows: list[dict[str, Any]]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """The goals of the rows, if any has one."""
    found = goals.goals(rows) if "times" in rows[0] and "case" not in rows[0] else []
    return [(goals.HEADINGS, found)] if found else []


def timing(row: dict[str, Any], name: str) -> Timing | None:
    values = row["times"].get(name)
    return None if values is None else Timing(**values)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
