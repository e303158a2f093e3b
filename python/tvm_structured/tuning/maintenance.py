"""Looking into tuning databases, merging and pruning them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tvm_structured.tuning.database import Database
from tvm_structured.tuning.lookup import unfitness
from tvm_structured.tuning.records import Best, CostRecord, Origin, Record, TaskRecord, Trial
from tvm_structured.tuning.versions import cost_version


@dataclass(frozen=True)
class Row:
    """A task of a database, as measured for one target with one version. `state`: empty where it can be used."""

    what: str
    target: str
    trials: int
    failed: int
    default_seconds: float | None
    seconds: float | None
    is_finished: bool
    state: str

    @property
    def ratio(self) -> float | None:
        return self.default_seconds / self.seconds if self.default_seconds and self.seconds else None


def rows(database: Database) -> list[Row]:
    """One row for each task, target and version, in the order in which they were begun."""
    tasks, found = database.tasks, []
    for origin, (trials, best) in by_origin(database).items():
        times = [trial.seconds for trial in trials if trial.seconds is not None]
        default = next((trial.seconds for trial in trials if trial.number == 0), None)
        found.append(
            Row(
                tasks[origin.key].what if origin.key in tasks else f"task {origin.key[:8]}",
                short_target(origin.target),
                len(trials) if best is None else max(best.trials, len(trials)),
                len(trials) - len(times),
                best.default_seconds if best else default,
                best.seconds if best else min(times, default=None),
                best is not None,
                unfitness(origin, origin.target),
            )
        )
    return found


def by_origin(database: Database) -> dict[Origin, tuple[list[Trial], Best | None]]:
    origins = dict.fromkeys(record.origin for record in database.records if isinstance(record, (Trial, Best)))
    return {origin: (database.history(origin), database.best(origin)) for origin in origins}


def short_target(text: str) -> str:
    """`znver5, 2 cores`: enough to tell targets apart."""
    try:
        target = json.loads(text)
    except ValueError:
        return text[:20]
    name = target.get("mcpu") or target.get("arch") or target.get("kind", "?")
    return f"{name}, {target['num-cores']} cores" if "num-cores" in target else str(name)


def merged(databases: Sequence[Database]) -> list[Record]:
    """All records of several databases. Of a task that several hold, the one with the most trials is taken whole: times
    of different machines are not to be compared one by one."""
    tasks: dict[str, Record] = {}
    costs: dict[str, Record] = {}
    groups: dict[Origin, tuple[list[Trial], Best | None]] = {}
    for database in databases:
        for record in database.records:
            if isinstance(record, TaskRecord):
                tasks.setdefault(record.key, record)
            elif isinstance(record, CostRecord):
                costs.setdefault(record.key, record)
        for origin, group in by_origin(database).items():
            if origin not in groups or effort(group) > effort(groups[origin]):
                groups[origin] = group
    return [*tasks.values(), *flatten(groups.values()), *costs.values()]


def effort(group: tuple[list[Trial], Best | None]) -> tuple[int, int]:
    trials, best = group
    return (best.trials if best else 0, len(trials))


def flatten(groups: Iterable[tuple[list[Trial], Best | None]]) -> list[Record]:
    return [record for trials, best in groups for record in (*trials, *([best] if best else []))]


def pruned(database: Database) -> list[Record]:
    """What is needed to compile: of finished tasks the hand schedule and the winner, of others all trials; nothing of
    other versions of TVM or of the kernels."""
    kept: list[Record] = []
    for origin, (trials, best) in by_origin(database).items():
        if unfitness(origin, origin.target):
            continue
        if best is None:
            kept += trials
        else:
            kept += [trial for trial in trials if trial.number == 0 or trial.config == best.config]
            kept.append(best)
    keys = {record.origin.key for record in kept if isinstance(record, (Trial, Best))}
    tasks = [record for record in database.tasks.values() if record.key in keys]
    costs = {record.key: record for record in database.records if isinstance(record, CostRecord)}
    return [*tasks, *kept, *(record for record in costs.values() if record.version == cost_version())]
