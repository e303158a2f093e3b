"""`tvm-structured db`: look into tuning databases, merge and prune them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

DIRECTORY = click.Path(path_type=Path)


@click.group()
def db() -> None:
    """Tuning databases: list, merge, prune."""


@db.command("list")
@click.argument("directory", type=DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(directory: Path, as_json: bool) -> None:
    """Print the tasks in DIRECTORY with their times, and what cannot be used."""
    from tvm_structured.tuning.database import Database
    from tvm_structured.tuning.display import listing
    from tvm_structured.tuning.maintenance import rows

    database = Database(directory)
    found = rows(database)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    click.echo(listing(found))
    click.echo(f"{len(database.trials)} trials of {len(database.tasks)} tasks, {len(database.costs)} costs of layers")
    for problem in database.problems:
        click.echo(str(problem))


@db.command()
@click.argument("destination", type=DIRECTORY)
@click.argument("sources", type=DIRECTORY, nargs=-1, required=True)
def merge(destination: Path, sources: tuple[Path, ...]) -> None:
    """Add the records of SOURCES to DESTINATION, which may be new. Of a task that several have, the one with the most
    trials is kept."""
    from tvm_structured.tuning.database import Database
    from tvm_structured.tuning.maintenance import merged

    others = [Database(source) for source in sources]
    database = Database(destination, must_exist=False)
    with database.locked():
        before = len(database)
        database.rewrite(merged([database, *others]))
    click.echo(f"{destination}: {len(database)} records, {before} before")


@db.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
def prune(directory: Path, dry_run: bool) -> None:
    """Keep what compiling needs: the best and the hand schedule of finished tasks, all trials of the others. What was
    measured with another TVM or another version of a kernel goes, and so do damaged lines."""
    from tvm_structured.tuning.database import Database
    from tvm_structured.tuning.maintenance import pruned

    database = Database(directory)
    with database.locked():
        before, kept = len(database), pruned(database)
        if not dry_run:
            database.rewrite(kept)
    would = "would be " if dry_run else ""
    click.echo(f"{directory}: {len(kept)} records {would}kept, {before - len(kept)} {would}removed")
